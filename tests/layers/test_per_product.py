"""Layers that round each product: published vectors, every kind of convolution, and no tensor of products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qexp.errors import QexpError
from qexp.layers.per_product import FAMILY
from qexp.layers.swap import swap
from qexp.quantizers.fixed_point import FixedPoint
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


def rounding(layer: nn.Module, accum: str, bits: int, greatest: float) -> nn.Module:
    """Returns the layer with an output format that holds up to `greatest`, computing in the mode `accum`."""
    q = FixedPoint(bits)
    q.fit(TensorStats.of(torch.tensor([greatest])))
    swap(layer, {"output": q}, {"_target_": FAMILY, "accum": accum})
    return layer.eval()


def linear(weights: list[float], bias: float | None) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=bias is not None)
    layer.weight.data = torch.tensor([weights])
    if bias is not None:
        layer.bias.data = torch.tensor([bias])
    return layer


@pytest.mark.parametrize("accum, value", [("per_op", 0.0), ("per_add", 0.0), ("exact", 0.046875)])
def test_products_below_half_a_step_vanish(accum, value):
    layer = rounding(linear([0.3] * 9, None), accum, 8, 1.9)
    assert layer(torch.full((1, 9), 0.02)).item() == value


@pytest.mark.parametrize("accum, code", [("per_op", 69), ("exact", 115)])
def test_sums_saturate_before_the_bias(accum, code):
    layer = rounding(linear([0.9] * 3, -0.9), accum, 8, 1.9)
    assert layer(torch.ones(1, 3)).item() == code / 64


def by_hand(layer: nn.Conv2d, x: torch.Tensor, q: FixedPoint) -> torch.Tensor:
    """Returns the convolution with each product materialised, in float64."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode).double()
    outputs = []
    for part, w in zip(x.chunk(layer.groups, 1), layer.weight.double().chunk(layer.groups, 0)):
        columns = F.unfold(part, w.shape[2:], layer.dilation, 0, layer.stride)
        size = [
            (part.shape[d + 2] - layer.dilation[d] * (w.shape[d + 2] - 1) - 1) // layer.stride[d] + 1 for d in (0, 1)
        ]
        products = quantized(w.flatten(1)[None, :, :, None] * columns[:, None], q)
        outputs.append(quantized(products.sum(2), q).unflatten(2, size))
    y = torch.cat(outputs, 1)
    return y if layer.bias is None else quantized(y + layer.bias.double()[:, None, None], q)


def quantized(x: torch.Tensor, q: FixedPoint) -> torch.Tensor:
    step = q.scale.double()
    return torch.round(x / step).clamp(*q.limits) * step


KINDS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "same": {"padding": "same"},
    "biasless": {"bias": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_convolution_equals_its_products_rounded_by_hand(kind):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 8, 3, **KINDS[kind]), torch.randn(2, 4, 9, 8)
    layer = rounding(layer, "per_op", 8, 3.0)
    with torch.no_grad():
        assert torch.equal(layer(x), by_hand(layer, x, layer.output_quantizer).float())


def test_one_dimension_equals_two_of_height_one():
    torch.manual_seed(0)
    line, x = nn.Conv1d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 11)
    flat = nn.Conv2d(3, 5, (1, 3), stride=(1, 2), padding=(0, 1))
    flat.weight.data, flat.bias.data = line.weight.data[:, :, None].clone(), line.bias.data.clone()
    line, flat = rounding(line, "per_op", 8, 3.0), rounding(flat, "per_op", 8, 3.0)
    assert torch.equal(line(x), flat(x[:, :, None])[:, :, 0])


def test_exact_is_the_ordinary_layer_rounded_once():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6)
    want = layer(x)
    layer = rounding(layer, "exact", 8, 3.0)
    assert torch.equal(layer(x), layer.output_quantizer(want))


def test_the_gradient_is_that_of_the_float_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), [x, layer.weight, layer.bias])
    layer = rounding(layer, "per_op", 16, 100.0)
    for got, expected in zip(torch.autograd.grad(layer(x).sum(), [x, layer.weight, layer.bias]), want):
        torch.testing.assert_close(got, expected)


class Largest(TorchDispatchMode):
    """Notes the greatest number of elements of any tensor an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_products_is_made():
    from qexp_kernels.fixed_point import reference

    x, w = torch.randn(1, 32, 48, 48), torch.randn(32, 32, 3, 3)
    products = 32 * 32 * 9 * 48 * 48
    with Largest() as seen:
        reference.forward(x, w, None, [1, 1], [1, 1], [1, 1], 1, 8, 5, "per_op", "half_even")
    assert seen.elements <= reference.CHUNK < products / 8


def test_what_cannot_be_computed_so_is_refused():
    fixed, uniform = FixedPoint(8), Uniform(8)
    with pytest.raises(QexpError, match="must be a FixedPoint quantizer"):
        swap(nn.Linear(3, 2), {"output": uniform}, {"_target_": FAMILY, "accum": "per_op"})
    with pytest.raises(QexpError, match="allowed are exact, per_op, per_add"):
        swap(nn.Linear(3, 2), {"output": fixed}, {"_target_": FAMILY, "accum": "half"})
    with pytest.raises(QexpError, match="ConvTranspose2d has no form"):
        swap(nn.ConvTranspose2d(3, 2, 3), {"output": fixed}, {"_target_": FAMILY, "accum": "per_op"})
    with pytest.raises(QexpError, match="at least 2 bits"):
        swap(nn.Linear(3, 2), {"output": FixedPoint(1)}, {"_target_": FAMILY})
