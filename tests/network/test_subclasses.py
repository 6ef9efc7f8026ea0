"""Subclasses with a forward of their own quantize, fold and lower by what they compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.integer.lowering import lower
from qexp.integer.verify import verify
from qexp.layers.quantized import QuantConv2d, QuantLinear, float_class
from qexp.layers.swap import bake, check_all_ran
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn, is_unfolded
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": False, "granularity": "tensor"}
CHANNELS = {"_target_": "qexp.quantizers.uniform.Uniform", "signed": True, "narrow": True, "granularity": "channel"}
X = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class OwnLinear(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, None if self.bias is None else self.bias.to(input.dtype))


class SameConv(nn.Conv2d):
    """Pads by the size of its input, more on the right and below."""

    def forward(self, x):
        sizes = []
        for n, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            more = max((-(-n // s) - 1) * s + k - n, 0)
            sizes += [more // 2, more - more // 2]
        return F.conv2d(F.pad(x, sizes), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardConv(nn.Conv2d):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.gain * (self.weight - mean) / (std + 1e-5), self.bias)


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act
        nn.init.uniform_(self.running_mean, -0.3, 0.3)
        nn.init.uniform_(self.running_var, 0.5, 2.0)
        nn.init.uniform_(self.weight, 0.5, 1.5)

    def forward(self, x):
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(self.drop(F.batch_norm(x, *statistics, self.training, self.momentum, self.eps)))


class Net(nn.Module):
    def __init__(self, conv=nn.Conv2d, linear=nn.Linear, stride: int = 1, **options) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 6, 3, stride=stride, **options), NormAct(6, nn.ReLU())
        self.point, self.norm2 = conv(6, 6, 1), NormAct(6, nn.Identity())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), linear(6, 4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.norm2(self.point(x)) + x
        return self.fc(torch.flatten(self.pool(x), 1))


def quantized(model):
    expected = model(X)
    found = facts(model, X[:1])
    fold_bn(model, found)
    found = facts(model, X[:1])
    assert (model(X) - expected).norm() < 1e-5 * expected.norm()
    plan = resolve(model, found, Recipe({"input": UNIFORM, "weight": CHANNELS}))
    apply(model, plan, found)
    calibrate(model, [X], progress=False)
    check_all_ran(model, X)
    return plan, expected


@pytest.mark.parametrize(
    ("conv", "stride", "options"),
    [
        (nn.Conv2d, 1, {"bias": False}),
        (SameConv, 1, {}),
        (SameConv, 2, {"bias": False}),
        (StandardConv, 1, {"padding": 1}),
        (StandardConv, 2, {"bias": False}),
    ],
)
def test_subclasses_quantize_and_fold_as_their_base_does(conv, stride, options):
    torch.manual_seed(0)
    model = Net(conv, OwnLinear, stride, **options).eval()
    keys = set(model.state_dict())
    plan, expected = quantized(model)
    assert {e.layer for e in plan} == {"conv", "point", "fc"}
    assert isinstance(model.conv, QuantConv2d) and isinstance(model.fc, QuantLinear)
    assert not any(is_unfolded(m) for m in model.modules()) and keys <= set(model.state_dict())
    assert 1e-4 < (model(X) - expected).norm() / expected.norm() < 0.05
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    copied.load_state_dict(model.state_dict())
    bake(model.fc)
    assert type(model.fc) is OwnLinear
    with torch.no_grad():
        assert torch.equal(copied(X), copied(X.clone()))


def test_a_folded_norm_with_an_activation_keeps_the_activation():
    torch.manual_seed(0)
    model = Net().eval()
    found = facts(model, X[:1])
    assert found.bn_of == {"conv": "norm.batch_norm", "point": "norm2.batch_norm"}
    fold_bn(model, found)
    assert "conv" in facts(model, X[:1]).followed_by_relu and "point" not in facts(model, X[:1]).followed_by_relu


@pytest.mark.parametrize("conv", [nn.Conv2d, SameConv, StandardConv])
def test_subclasses_lower(conv):
    torch.manual_seed(0)
    model = Net(conv, OwnLinear).eval()
    quantized(model)
    verdict = verify(model, lower(model, X[:1]), [(X, None)], progress=False)
    assert verdict.equal, verdict.line()


def test_a_convolution_that_pads_by_size_is_known_at_one_size():
    torch.manual_seed(0)
    model = Net(SameConv, stride=2).eval()
    quantized(model)
    with pytest.raises(QexpError, match=r"got a map of \[8, 8\] and was read with \[9, 9\]; use images of one size"):
        model(torch.randn(2, 3, 8, 8))


class LowRank(nn.Linear):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.a, self.b = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("linear", [LowRank, Scaled])
def test_a_subclass_that_computes_something_else_is_refused(linear):
    torch.manual_seed(0)
    model = Net(linear=linear).eval()
    expected, weight = model(X), model.fc.weight.clone()
    found = facts(model, X[:1])
    assert float_class(model.fc) is linear and torch.equal(model(X), expected) and torch.equal(model.fc.weight, weight)
    with pytest.raises(QexpError, match=rf"fc \({linear.__name__}\) compute with weights that cannot carry quantizers"):
        resolve(model, found, Recipe({"input": UNIFORM, "weight": CHANNELS}))
