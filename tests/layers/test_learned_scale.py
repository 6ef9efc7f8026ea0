"""XNOR-Net++: the learned factors of a result, their gradients, their number, and what becomes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.layers.learned_scale import LEARNED_SCALE
from qexp.layers.quantized import is_quantizer_parameter
from qexp.layers.swap import quantizers_off, swap, unswap
from qexp.quantizers.bwn import BWN


def layer(scale: str, out: int = 2, size: tuple[int, int] = (2, 3)) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, out, 1, bias=False)
    swap(conv, {"weight": BWN(1, (out, 3, 1, 1), scaled=False)}, {"_target_": LEARNED_SCALE, "scale": scale})
    conv.shaped({"output": (1, out, *size)})
    return conv


def put(parameter: nn.Parameter, *values: float) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values).reshape(parameter.shape))


def test_the_rank_one_vector_and_its_gradients():
    conv = layer("rank1")
    put(conv.gain_out, 0.5, 0.25)
    put(conv.gain_height, 1, 0.8)
    put(conv.gain_width, 1, 1.2, 0.9)
    g = torch.tensor([[[0.5, 0.6, 0.45], [0.4, 0.48, 0.36]], [[0.25, 0.3, 0.225], [0.2, 0.24, 0.18]]])
    assert torch.allclose(conv.gains(), g)
    d = torch.tensor([[[2.0, -4, 6], [0, 2, -2]], [[4, 4, -2], [-6, 0, 2]]])
    back = torch.tensor([[[1, 0, -1], [0.5, 1, 0]], [[0, 1, 1], [-1, 0, 2]]])
    (d * conv.gains() * back).sum().backward()
    assert conv.gain_out.grad.flatten().tolist() == pytest.approx([-1.48, 10.68])
    assert conv.gain_height.grad.flatten().tolist() == pytest.approx([-0.95, 3.6])
    assert conv.gain_width.grad.flatten().tolist() == pytest.approx([2.2, 1.8, -2.7])


@pytest.mark.parametrize(("scale", "count"), [("out", 64), ("dense", 4096), ("out_space", 128), ("rank1", 80)])
def test_counts(scale, count):
    conv = layer(scale, 64, (8, 8))
    assert sum(getattr(conv, name).numel() for name in conv.learns) == count
    assert torch.allclose(conv.gains().expand(64, 8, 8)[:, 3, 3], conv.weight.abs().mean((1, 2, 3))), "starts as BWN"


@pytest.mark.parametrize("scale", ["out", "dense", "out_space", "rank1"])
def test_the_result_is_the_product_of_signs_times_the_factors(scale):
    conv, x = layer(scale), torch.randn(4, 3, 2, 3)
    for name in conv.learns:
        nn.init.uniform_(getattr(conv, name))
    signs = torch.where(conv.weight >= 0, 1.0, -1.0)
    assert torch.allclose(conv(x), nn.functional.conv2d(x, signs) * conv.gains(), atol=1e-6)
    with quantizers_off(conv):
        assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight))
    assert {id(getattr(conv, n)) for n in conv.learns} <= is_quantizer_parameter(nn.Sequential(conv))


def test_the_factors_go_with_the_quantizers():
    conv = layer("rank1")
    unswap(conv)
    assert type(conv) is nn.Conv2d and set(conv.state_dict()) == {"weight"} and "learns" not in vars(conv)


def test_a_linear_layer_has_a_factor_for_each_output():
    linear = nn.Linear(4, 3)
    swap(linear, {"weight": BWN(1, (3, 4), scaled=False)}, {"_target_": LEARNED_SCALE})
    linear.shaped({"output": (1, 3)})
    x, signs = torch.randn(5, 4), torch.where(linear.weight >= 0, 1.0, -1.0)
    assert torch.allclose(linear(x), x @ signs.T * linear.weight.abs().mean(1) + linear.bias, atol=1e-6)


def test_images_of_another_size_and_unknown_forms_are_refused():
    with pytest.raises(QexpError, match=r"built for results of size \[2, 3\], got \[4, 4\]"):
        layer("rank1")(torch.randn(1, 3, 4, 4))
    assert layer("out")(torch.randn(1, 3, 4, 4)).shape == (1, 2, 4, 4)
    with pytest.raises(QexpError, match=r"compute.scale='full' is not allowed"):
        layer("full")
