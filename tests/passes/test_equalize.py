"""Cross-layer equalization: ranges are shared out, the float network stays; pairs it may not touch are left, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.weight_channels import input_range, output_range, response
from qexp.network.facts import facts
from qexp.network.lean_evaluation import lean
from qexp.passes.base import PassContext
from qexp.passes.equalize import ClippedReLU, Equalize, find_pairs
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import Recipe, apply, resolve


def moment_of(model: nn.Module, x: Tensor, folded=None) -> PassContext:
    return PassContext(facts(model, x[:1]), [x], {}, folded=folded or {})


def equalized(model: nn.Module, x: Tensor, **options) -> tuple[nn.Module, PassContext]:
    model = copy.deepcopy(model.eval())
    context = moment_of(model, x)
    Equalize(**options).on_float(model, context)
    return model, context


def uneven(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Makes a layer's output channels differ by orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    factor = torch.exp(torch.randn(layer.weight.shape[axis], generator=g))
    shape = [-1 if d == axis else 1 for d in range(layer.weight.ndim)]
    layer.weight.data.mul_(factor.reshape(shape))
    return layer


def test_the_vector():
    """V2.5-a."""
    first, second = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
    first.weight.data = torch.tensor([[4.0], [-1.0], [0.25]])
    second.weight.data = torch.tensor([[1.0, 1.0, -4.0]])
    model, _ = equalized(nn.Sequential(first, nn.ReLU(), second), torch.randn(4, 1))
    assert model[0].weight.flatten().tolist() == [2, -1, 1] and model[2].weight.flatten().tolist() == [2, 1, -1]


class Gate(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, first: nn.Module, between: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    ("first", "between", "second"),
    [
        (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
        (nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 3, groups=2)),
        (nn.Conv2d(3, 8, 3, bias=False), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3, groups=8)),
        (nn.Conv2d(4, 8, 3, groups=2), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 2, groups=2)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)),
        (nn.Conv2d(3, 5, 3), nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Flatten()), nn.Linear(5 * 36, 7)),
        (nn.Conv2d(3, 8, 3), nn.Identity(), nn.Conv2d(8, 4, 3)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_ranges_become_equal_and_the_results_stay(first, between, second):
    torch.manual_seed(0)
    model = Gate(uneven(copy.deepcopy(first)), between, uneven(copy.deepcopy(second), 1)).eval()
    x = torch.randn(4, first.in_channels, 8, 8)
    found, context = equalized(model, x)
    count = len(output_range(found.first))
    torch.testing.assert_close(output_range(found.first), input_range(found.second, count), rtol=2e-3, atol=0)
    product = output_range(model.first) * input_range(model.second, count)
    torch.testing.assert_close(output_range(found.first).square(), product, rtol=1e-3, atol=0)
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
    assert context.findings["equalized_pairs"] == 1 and context.findings["equalize_change"] < 1e-4


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_a_whole_network_stays_the_same(seed):
    """Batch norm folded, depthwise and grouped convolutions, a residual add that branches."""
    from tests.networks import Residual

    torch.manual_seed(seed)
    model = Residual().eval()
    x = torch.randn(4, 3, 8, 8)
    fold_bn(model, facts(model, x))
    pairs, refused = find_pairs(model, facts(model, x))
    assert [(p.first, p.second) for p in pairs] == [("depthwise", "grouped"), ("conv", "fc")]
    assert set(refused) == {"stem", "grouped"} and "branch" in refused["stem"]
    found, context = equalized(model, x)
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
    assert context.findings["equalize_sweeps"] == 2, "separate pairs are done in one sweep, and a second sees that"


def block(relu: type[nn.Module] = nn.ReLU6, gain: float = 20.0) -> nn.Sequential:
    """MobileNetV2's expansion, depthwise convolution and projection."""
    torch.manual_seed(1)
    layers = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 6, 1)
    expand, depthwise, project = (uneven(layer, i) for i, layer in enumerate(layers))
    expand.weight.data.mul_(gain)
    return nn.Sequential(expand, relu(), depthwise, relu(), project).eval()


def test_a_depthwise_layer_between_two_ends_with_the_range_of_both():
    x = torch.randn(4, 4, 8, 8)
    model = block(nn.ReLU)
    found, context = equalized(model, x)
    before, middle, after = output_range(found[0]), output_range(found[2]), input_range(found[4], 12)
    torch.testing.assert_close(before, middle, rtol=5e-3, atol=0)
    torch.testing.assert_close(middle, after, rtol=5e-3, atol=0)
    assert 2 < context.findings["equalize_sweeps"] < 20
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_relu6_becomes_relu_or_keeps_its_function_with_bounds_by_channel_or_bars_the_pair():
    x = torch.randn(4, 4, 8, 8) * 3
    model, pure = block(), block(nn.ReLU)
    assert not torch.allclose(model(x), pure(x), rtol=1e-2), "the bound matters here"
    found, context = equalized(model, x, relu6="relu")
    assert type(found[1]) is nn.ReLU and context.findings["equalize_change"] > 1e-2
    torch.testing.assert_close(found(x), pure(x), rtol=1e-4, atol=1e-4)
    found, context = equalized(model, x, relu6="clip")
    assert type(found[1]) is ClippedReLU and found[1].bound.shape == (12, 1, 1) and found[1].bound.unique().numel() > 1
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)
    assert "1.bound" in found.state_dict()
    with pytest.raises(QexpError, match="a ReLU6 follows"):
        equalized(model, x, relu6="skip")


def test_bounds_by_channel_survive_an_evaluation_that_leaves_out_redundant_relus():
    x = torch.randn(4, 4, 8, 8) * 3
    model, context = equalized(block(), x, relu6="clip")
    uniform = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}
    apply(model, resolve(model, context.facts, Recipe(sites={"input": uniform, "weight": uniform})), context.facts)
    calibrate(model, [x], progress=False)
    with torch.no_grad():
        before = model.eval()(x)
        with lean(model, x):
            assert torch.equal(model(x), before)


def test_a_relu6_that_is_shared_is_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    with pytest.raises(QexpError, match="shared, not a module of its own"):
        equalized(Shared(), torch.randn(2, 3, 4, 4))


def test_channels_of_zeros_keep_their_factor():
    model = Gate(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():
        model.first.weight[1] = 0
        model.second.weight[:, 4] = 0
    x = torch.randn(2, 3, 8, 8)
    found, context = equalized(model, x)
    assert context.findings["equalize_dead"] == 2
    assert all(torch.isfinite(t).all() for t in found.state_dict().values())
    assert (
        torch.equal(found.second.weight[:, 1], model.second.weight[:, 1]) and found.first.bias[1] == model.first.bias[1]
    )
    assert torch.equal(found.first.weight[4], model.first.weight[4])
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)


def with_bn(beta: float) -> Gate:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6)
    nn.init.constant_(bn.bias, beta)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    model = Gate(nn.Conv2d(3, 6, 1), nn.Sequential(bn, nn.ReLU()), nn.Conv2d(6, 4, 1, bias=False)).eval()
    return model


def test_high_biases_move_into_the_next_layer():
    model, x = with_bn(9.0), torch.randn(64, 3, 8, 8)
    with torch.no_grad():  # statistics as the batch norm shall know them
        y = model.first(x)
        model.between[0].running_mean.copy_(y.mean((0, 2, 3)))
        model.between[0].running_var.copy_(y.var((0, 2, 3)))
    folded = fold_bn(model, facts(model, x[:1]))
    before, highest = model(x), model.between(model.first(x)).amax()
    context = moment_of(model, x, folded)
    Equalize(absorb=True).on_float(model, context)
    assert context.findings["absorbed_biases"] == 6 and model.second.bias is not None
    known = context.folded["first"]
    seen = model.first(x)
    torch.testing.assert_close(
        seen.mean((0, 2, 3)), known.mean, rtol=1e-3, atol=1e-3
    )  # what is known follows the factors
    torch.testing.assert_close(seen.std((0, 2, 3)), known.std, rtol=1e-2, atol=1e-3)
    assert (model(x) - before).norm().item() / before.norm().item() < 0.01, "only what lay below beta - 3 gamma moves"
    assert model.between(seen).amax() < highest


def test_an_unfolded_batch_norm_an_untraceable_model_and_nonlinear_layers_are_refused():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(QexpError, match="fold it with bn=fold"):
        equalized(with_bn(0.0), x)
    with pytest.raises(QexpError, match="SiLU follows, which no factor passes through"):
        equalized(Gate(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)), x)

    class Branching(Gate):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y if y.sum() > 0 else -y)

    with pytest.raises(QexpError, match="cannot be traced"):
        equalized(Branching(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), x)

    class Adds(Gate):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(self.between(y)) + y

    with pytest.raises(QexpError, match="their results branch"):
        equalized(Adds(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), x)


@pytest.mark.parametrize("options", [{"relu6": "keep"}, {"sweeps": 0}, {"tolerance": 0.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(QexpError, match="is not allowed; use"):
        Equalize(**options)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Linear(4, 6),
        nn.Conv1d(4, 2, 3),
        nn.Conv3d(4, 2, 2),
    ],
    ids=str,
)
def test_the_response_is_what_a_constant_input_gives(layer):
    mean = torch.randn(4)
    x = mean.reshape(1, 4, *[1] * (layer.weight.ndim - 2)).expand(1, 4, *[7] * (layer.weight.ndim - 2))
    y = layer(x) - layer.bias.reshape(-1, *[1] * (layer.weight.ndim - 2))
    torch.testing.assert_close(
        response(layer, layer.weight, mean).float(), y.flatten(2).mean((0, 2)) if y.ndim > 2 else y[0]
    )


def test_the_response_of_a_transposed_convolution_is_the_mean_over_its_positions():
    layer, mean = nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2, bias=False), torch.randn(4)
    y = layer(mean.reshape(1, 4, 1, 1).expand(1, 4, 9, 9))[:, :, 4:-4, 4:-4]
    torch.testing.assert_close(response(layer, layer.weight, mean).float(), y.mean((0, 2, 3)))
