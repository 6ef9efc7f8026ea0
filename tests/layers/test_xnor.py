"""XNOR layers against the paper's formula written out, on strides, padding, groups and biases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.layers import quantizers_off, swap
from qexp.layers.xnor import XNOR
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.bwn import BWN
from qexp.quantizers.sign import Sign
from qexp.statistics.stats import TensorStats

TARGET = "qexp.layers.xnor.XNOR"


def made(layer: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    sign = Sign(1, (1, *x.shape[1:]))
    sign.fit(TensorStats.of(x))
    weight = BWN(1, tuple(layer.weight.shape), granularity=PerChannel(0))
    swap(layer, {"input": sign, "weight": weight}, {"_target_": TARGET, **options})
    return layer


def written_out(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The formula, one window at a time."""
    sign = torch.where(x >= 0, 1.0, -1.0)
    pad, k, s = conv.padding[0], conv.kernel_size[0], conv.stride[0]
    sign, size = (nn.functional.pad(t, [pad] * 4) for t in (sign, x.abs()))
    per_group = conv.in_channels // conv.groups
    out = torch.zeros(len(x), conv.out_channels, *[(sign.shape[2] - k) // s + 1] * 2)
    for o in range(conv.out_channels):
        group = o // (conv.out_channels // conv.groups)
        channels = slice(group * per_group, (group + 1) * per_group)
        w = conv.weight[o]
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                window = (slice(None), channels, slice(i * s, i * s + k), slice(j * s, j * s + k))
                product = (sign[window] * torch.where(w >= 0, 1.0, -1.0)).sum((1, 2, 3))
                scale = size[window].mean(1).sum((1, 2)) / k**2
                out[:, o, i, j] = product * scale * w.abs().mean()
    return out if conv.bias is None else out + conv.bias.reshape(-1, 1, 1)


@pytest.mark.parametrize(
    ("stride", "padding", "groups", "bias"), [(1, 1, 1, True), (2, 0, 1, False), (1, 1, 2, False), (2, 1, 4, True)]
)
def test_convolution_is_the_formula(stride, padding, groups, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    conv = made(nn.Conv2d(4, 8, 3, stride, padding, groups=groups, bias=bias), x)
    with torch.no_grad():
        assert torch.allclose(conv(x), written_out(conv, x), atol=1e-5)


def test_without_the_map_it_is_the_convolution_of_signs():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    conv = made(nn.Conv2d(3, 4, 3), x, input_scale="none")
    alpha = conv.weight.abs().mean((1, 2, 3)).reshape(1, -1, 1, 1)
    signs = nn.functional.conv2d(torch.sign(x), torch.sign(conv.weight))
    assert torch.allclose(conv(x), signs * alpha + conv.bias.reshape(-1, 1, 1), atol=1e-6)


def test_linear_layers_have_one_magnitude_a_row():
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    layer = made(nn.Linear(7, 3), x)
    alpha, beta = layer.weight.abs().mean(1), x.abs().mean(1, keepdim=True)
    expected = torch.sign(x) @ torch.sign(layer.weight).T * alpha * beta + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_the_input_gradient_is_the_sign_s_alone():
    torch.manual_seed(0)
    x = (2 * torch.randn(2, 3, 5, 5)).requires_grad_()
    conv = made(nn.Conv2d(3, 4, 3, bias=False), x.detach())
    (dx,) = torch.autograd.grad(conv(x).sum(), x)
    assert not dx[x.detach().abs() > 1].any() and dx[x.detach().abs() <= 1].any()


def test_other_paddings_reach_the_map_too():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 5)
    conv = made(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", bias=False), x)
    valid = made(nn.Conv2d(2, 2, 3, bias=False), x)
    with torch.no_grad():
        valid.weight.copy_(conv.weight)
        assert torch.allclose(conv(x), valid(nn.functional.pad(x, [1] * 4, mode="reflect")), atol=1e-6)


def test_float_inside_quantizers_off_and_options_are_checked():
    x = torch.randn(1, 2, 5, 5)
    conv = nn.Conv2d(2, 2, 3)
    y = conv(x)
    made(conv, x)
    with quantizers_off(conv):
        assert torch.equal(conv(x), y)
    with pytest.raises(QexpError, match="input_scale='box'; allowed are map, none"):
        made(nn.Conv2d(2, 2, 3), x, input_scale="box")
    with pytest.raises(QexpError, match="takes no options, got scale"):
        made(nn.Conv2d(2, 2, 3), x, scale=1)
    assert set(XNOR) == {nn.Conv2d, nn.Linear}
