"""Batch norms folded: the float output does not change for any kind of convolution."""

import copy

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn


class ConvBn(nn.Module):
    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(conv, nn.Identity(), bn, nn.ReLU())

    def forward(self, x):
        return self.body(x)


def shaken(bn: nn.Module) -> nn.Module:
    for t in (bn.weight, bn.bias):
        if t is not None:
            nn.init.uniform_(t, -1, 2)
    nn.init.uniform_(bn.running_mean, -1, 1)
    nn.init.uniform_(bn.running_var, 0.1, 3)
    return bn


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Conv2d(4, 8, 3, groups=2, stride=2),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_the_output_does_not_change(conv, affine):
    torch.manual_seed(0)
    conv = copy.deepcopy(conv)
    model = ConvBn(conv, shaken(nn.BatchNorm2d(conv.out_channels, affine=affine))).eval()
    x = torch.randn(2, 4, 9, 9)
    before = model(x)
    assert list(fold_bn(model, facts(model, x))) == ["body.0"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_vector():
    """V2.6-a."""
    conv, bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1e-5)
    for tensor, value in (
        (conv.weight, 0.5),
        (conv.bias, 0.2),
        (bn.weight, 0.8),
        (bn.bias, 0.3),
        (bn.running_mean, 0.1),
        (bn.running_var, 0.25),
    ):
        tensor.data.fill_(value)
    model = ConvBn(conv, bn).eval()
    fold_bn(model, facts(model, torch.ones(1, 1, 2, 2)))
    assert conv.weight.item() == pytest.approx(0.79998400, abs=1e-7)
    assert conv.bias.item() == pytest.approx(0.45999680, abs=1e-7)


def test_a_whole_network(residual):
    x = torch.randn(3, 3, 8, 8)
    before = residual(x)
    assert sorted(fold_bn(residual, facts(residual, x))) == ["depthwise", "grouped", "stem"]
    torch.testing.assert_close(residual(x), before, rtol=1e-5, atol=1e-5)
    again = facts(residual, x)
    assert not again.bn_of and "stem" in again.followed_by_relu and "grouped" not in again.followed_by_relu


def test_a_batch_norm_with_two_sources_or_a_conv_with_two_users_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.shared, self.alone = shaken(nn.BatchNorm2d(3)), shaken(nn.BatchNorm2d(3))

        def forward(self, x):
            y = self.a(x)
            return self.shared(y) + self.shared(self.b(x)) + self.alone(y)

    model = Shared().eval()
    x = torch.randn(2, 3, 4, 4)
    before = model(x)
    assert fold_bn(model, facts(model, x)) == {}
    assert torch.equal(model(x), before)


def test_an_untraceable_network_is_refused_with_the_way_out():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.mean() > 0 else self.conv(x)

    model = Branching().eval()
    with pytest.raises(QexpError, match=r"bn=fold needs to know .*Branching cannot be traced.*use bn=keep"):
        fold_bn(model, facts(model, torch.ones(1, 3, 4, 4)))
