"""One convolution or linear layer of a simulated network, computed on integer codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from qexp_kernels import regrid
from qexp_kernels.fused_conv import Products
from qexp_kernels.regrid import Step
from torch import Tensor, nn

from qexp.integer import int8
from qexp.layers.quantized import QuantConv2d, Quantized, QuantLinear
from qexp.quantizers.base import GridQuantizer, Quantizer

_ROUNDING = (
    2.0**-22
)  # of the greatest weight: what float32's roundings move a level that a formula such as 2 k / n - 1 gives


class Refused(Exception):
    """A layer cannot be evaluated on codes, for the reason given."""


class Behind(Protocol):
    """What follows a layer in the same pass over its results."""

    @property
    def active(self) -> bool:
        """Whether it may be computed now."""

    def clear(self) -> None:
        """Forgets what an earlier run gave away."""

    def lent(self, layer: CodeLayer) -> Tensor | None:
        """Returns the values that were given away in this run, which the layer's result is added to; None if there are none."""

    def of_codes(self, layer: CodeLayer, x: Tensor) -> Tensor:
        """Returns what the layer gives for bytes, and what follows."""

    def of_values(self, *xs: Tensor) -> Tensor:
        """Returns what follows values, or the sum of two."""

    def take(self, layer: CodeLayer, x: Tensor) -> Tensor | None:
        """Returns the bytes that belong to a tensor that was given away for the layer to read; None for another tensor."""


class CodeLayer:
    """The computation of a quantized layer on codes; `run` takes the place of its `forward`.

    Attributes:
        layer: The quantized layer.
        scale, scales: Value of a code of the input, and of the weight for each output channel.
        bias: One number per output channel, or None.
        grid: What makes bytes of the input, as constants of `regrid`; None where the quantizer has its own way.
        products: The layer's sums as `fused_conv` computes them; None where oneDNN is faster.
        behind: What follows the layer in the same pass, if anything.
        source: What makes the layer's bytes together with its input, if anything.
        beside: What makes the values that are added to the layer's, if the addition is in the same pass.
    """

    @torch.no_grad()
    def __init__(self, layer: nn.Module) -> None:
        self.layer = _accepted(layer)
        self.grid, self._enter, self.scale, zero = _entrance(layer.input_quantizer)
        weight, self.scales = _weight(layer)
        low, high = (int(v) for v in layer.input_quantizer.limits)
        check_sums(weight, low, high)
        window = (1, 1), (0, 0), (1, 1), 1
        if isinstance(layer, nn.Conv2d):
            window = layer.stride, layer.padding, layer.dilation, layer.groups
        bias = layer.quantized_bias()
        self.bias = None if bias is None else bias.detach().float()
        zero += int8.offset(low)
        self._values = int8.through_onednn(weight, zero, *window, scale=self.scale, scales=self.scales, bias=self.bias)
        self.products: Products | None = int8.tiled(weight, zero, *window) if isinstance(layer, nn.Conv2d) else None
        self.behind: Behind | None = None
        self.source: Behind | None = None
        self.beside: Behind | None = None

    def run(self, x: Tensor) -> Tensor:
        """Returns the layer's result, or what `behind` makes of it."""
        layer = self.layer
        if self.behind is not None:
            self.behind.clear()
        if not layer.enabled:
            return layer.float_class.forward(layer, x)
        if isinstance(layer, nn.Linear):
            y = self.values(self.codes(x.reshape(-1, x.shape[-1], 1, 1))).reshape(*x.shape[:-1], -1)
        elif x.dim() == 3:
            y = self.values(self.codes(x[None]))[0]
        elif self.behind is not None and self.behind.active:
            return self.behind.of_codes(self, self.codes(x))
        else:
            y = self.values(self.codes(x))
        return layer.finish(y)

    def values(self, x: Tensor) -> Tensor:
        """Returns the layer's values for bytes: the sums, times scales, plus bias."""
        return self._values(x)

    def codes(self, x: Tensor) -> Tensor:
        """Returns a tensor's bytes, which may be there already."""
        found = None if self.source is None else self.source.take(self, x)
        return self._enter(x.float()) if found is None else found  # in float32, whatever the precision around


def _accepted(layer: nn.Module) -> Quantized:
    if not isinstance(layer, Quantized):
        raise Refused("not quantized")
    if (
        type(layer) not in (QuantConv2d, QuantLinear)
        or not layer.enabled
        or layer._forward_hooks
        or layer._forward_pre_hooks
    ):
        raise Refused("its computation is its own")
    if layer.weight.device.type != "cpu":
        raise Refused("dot products on codes run on the CPU")
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        raise Refused("its padding is not by a number of zeros")
    return layer


def _entrance(quantizer: nn.Module) -> tuple[Tensor | None, Callable[[Tensor], Tensor], float, int]:
    """Returns what makes bytes of a layer's input, as constants and as a function, the value of a code and the code of zero."""
    if not isinstance(quantizer, Quantizer):
        raise Refused("its input is not quantized")
    if quantizer.dynamic or not bool(quantizer.ready) or "stochastic" in (quantizer.rounding, quantizer.noise):
        raise Refused("its input's codes depend on the batch or on chance")
    limits = [torch.as_tensor(v) for v in quantizer.limits]
    if any(v.numel() > 1 for v in limits) or quantizer.scale.numel() > 1 or quantizer.granularity.kind != "tensor":
        raise Refused("its input has a scale or a width per channel")
    low, high = (int(v) for v in limits)
    if high - low > 255 or low > 0:
        raise Refused("its input has more than 8 bits")
    codes = torch.arange(low, high + 1)
    scale, zero = float(quantizer.scale), _whole(quantizer.zero_point)
    values = quantizer.dequantize(codes.reshape(1, -1, *[1] * 2)).flatten()
    if not torch.equal(values, (codes - zero).float() * torch.tensor(scale)):
        raise Refused("its input's levels are no multiples of a number")
    grid, offset = _grid(quantizer, low), int8.offset(low)
    if grid is None:
        return None, lambda x: (quantizer.codes(x) + offset).to(torch.uint8), scale, zero
    return grid, lambda x: regrid([x], [Step("grid", 0, 1, 0)], [torch.uint8], [grid])[0], scale, zero


def _grid(quantizer: Quantizer, low: int) -> Tensor | None:
    """Returns the constants with which `regrid` makes codes plus the offset; None where the quantizer has its own way."""
    if not isinstance(quantizer, GridQuantizer) or quantizer.rounding != "half_even":
        return None
    plain, probe = GridQuantizer, torch.zeros(1, 1, 1, 1)
    as_given = type(quantizer).prepared is plain.prepared or quantizer.prepared(probe)[0] is probe
    if not as_given or (type(quantizer).codes, type(quantizer).scale_and_zero) != (plain.codes, plain.scale_and_zero):
        return None
    edges = [torch.as_tensor(v) for v in quantizer.edges]
    if any(v.numel() > 1 for v in edges):
        return None
    numbers = (float(quantizer.scale), float(quantizer.zero_point), *map(float, edges), int8.offset(low), 0)
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def _weight(layer: Quantized) -> tuple[Tensor, Tensor]:
    """Returns a layer's weight as int8 and the value of a code for each output channel."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, Quantizer):
        raise Refused("its weight is not quantized")
    outputs, value = layer.weight.shape[0], layer.quantized_weight().double()
    codes = quantizer.codes(layer.weight).double()
    # read last: some methods measure the weight while they quantize it
    scale, zero = getattr(quantizer, "scale", None), getattr(quantizer, "zero_point", torch.zeros(1))
    if scale is None or quantizer.granularity.kind == "group" or scale.numel() not in (1, outputs):
        raise Refused("its weight has no single scale per output channel")
    codes, step = codes - zero.double(), scale.detach().double()
    if not torch.equal(codes, codes.round()):  # no code for zero: odd multiples of half a step
        codes, step = 2 * codes, step / 2
    if codes.min() < -128 or codes.max() > 127:
        raise Refused("its weight has more than 8 bits")
    if not torch.equal(codes, codes.round()):
        raise Refused("its weight's zero is no code, nor half-way between two")
    if ((value - codes * step).abs() > _ROUNDING * value.abs().max()).any():
        raise Refused("its weight's levels are no multiples of a number")
    weight = codes.to(torch.int8).reshape(*layer.weight.shape, *[1] * (4 - layer.weight.dim()))
    return weight.contiguous(), step.float().reshape(-1).expand(outputs).contiguous()


def check_sums(weight: Tensor, low: int, high: int) -> None:
    """Raises where the sums of products would not be exact on this processor."""
    moved, most = high + int8.offset(low), int(weight.int().abs().max())
    if not int8.exact_pairs(moved, most):
        raise Refused("this processor adds such products inexactly; codes of inputs up to 127 are exact")
    if int(weight[0].numel()) * moved * most >= 2**31:
        raise Refused("its sums do not fit into 32 bits")


def _whole(zero: Tensor) -> int:
    if zero.numel() > 1 or not float(zero).is_integer():
        raise Refused("its input has no code for zero")
    return int(zero)
