"""Evaluates a simulated network's convolutions and linear layers on integer codes, with the processor's 8-bit dot products.

The simulation multiplies real values that lie on grids. Their sums round in float32, in an order that the library chooses. On codes the
same sums are exact integers, and scales and bias are applied once after. A result so differs from the simulation's only by the rounding
of float32, and a code behind it only where that rounding crosses the border between two codes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from qexp_kernels import regrid
from qexp_kernels.regrid import Step
from torch import Tensor, nn

from qexp.integer import int8
from qexp.layers.quantized import QuantConv2d, Quantized, QuantLinear, float_class
from qexp.quantizers.base import GridQuantizer, Quantizer
from qexp.system.within import evaluating, hooked

log = logging.getLogger(__name__)
_SHOWN = 6  # names in a message
_ROUNDING = (
    2.0**-23
)  # of the greatest weight: what float32's roundings move a level that a formula such as 2 k / n - 1 gives


@dataclass
class OnCodes:
    """What is evaluated on codes.

    Attributes:
        layers: Layers whose products are computed on codes.
        others: Why each other convolution and linear layer is not, by name.
        share: Share of the products of an image that are computed on codes.
    """

    layers: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    share: float = 0.0

    def line(self) -> str:
        """Returns one line for people."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.others.items():
            reasons.setdefault(why, []).append(name)
        rest = "; ".join(
            f"{', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}: {why}"
            for why, names in reasons.items()
        )
        return f"{100 * self.share:.1f} % of the products on codes" + (f"; in floating point {rest}" if rest else "")


class _Refused(Exception):
    """A layer cannot be evaluated on codes, for the reason given."""


@contextmanager
def on_codes(model: nn.Module, example: Tensor) -> Iterator[OnCodes]:
    """Evaluates layers on codes inside a `with` block where that is exact; the others stay as they are.

    The model must be in evaluation mode for its results to be those of this block; its quantizers must be calibrated.

    Args:
        model: The quantized network.
        example: An image `[1, C, H, W]`, for the share of products.
    """
    found, changed = OnCodes(), []
    try:
        for name, layer in model.named_modules():
            if not issubclass(float_class(layer), nn.Conv2d | nn.Linear):
                if isinstance(layer, nn.Conv1d | nn.Conv3d | nn.ConvTranspose2d):
                    found.others[name] = f"{float_class(layer).__name__} has no dot products on codes"
                continue
            try:
                layer.forward = _forward(layer)
            except _Refused as reason:
                found.others[name] = str(reason)
            else:
                changed.append(layer)
                found.layers.append(name)
        found.share = _share(model, example, set(found.layers))
        yield found
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


@torch.no_grad()
def _forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns a layer's computation on codes; raises the reason where there is none."""
    if not isinstance(layer, Quantized):
        raise _Refused("not quantized")
    if (
        type(layer) not in (QuantConv2d, QuantLinear)
        or not layer.enabled
        or layer._forward_hooks
        or layer._forward_pre_hooks
    ):
        raise _Refused("its computation is its own")
    if layer.weight.device.type != "cpu":
        raise _Refused("dot products on codes run on the CPU")
    enter, scale, zero = _entrance(layer.input_quantizer)
    weight, scales = _weight(layer)
    low, high = (int(v) for v in layer.input_quantizer.limits)
    _check_sums(weight, low, high)
    window = (1, 1), (0, 0), (1, 1), 1
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise _Refused("its padding is not by a number of zeros")
        window = layer.stride, layer.padding, layer.dilation, layer.groups
    bias = layer.quantized_bias()
    bias = None if bias is None else bias.detach().float()
    product = int8.through_onednn(weight, zero + int8.offset(low), *window, scale=scale, scales=scales, bias=bias)

    def run(x: Tensor) -> Tensor:
        x = x.float()  # codes are computed in float32, whatever the precision around
        if isinstance(layer, nn.Linear):
            y = product(enter(x.reshape(-1, x.shape[-1], 1, 1))).reshape(*x.shape[:-1], -1)
        else:
            y = product(enter(x if x.dim() == 4 else x[None]))
            y = y if x.dim() == 4 else y[0]
        return layer.finish(y)

    return run


def _entrance(quantizer: nn.Module) -> tuple[Callable[[Tensor], Tensor], float, int]:
    """Returns what makes bytes of a layer's input, the value of a code and the code of zero."""
    if not isinstance(quantizer, Quantizer):
        raise _Refused("its input is not quantized")
    if quantizer.dynamic or not bool(quantizer.ready) or "stochastic" in (quantizer.rounding, quantizer.noise):
        raise _Refused("its input's codes depend on the batch or on chance")
    limits = [torch.as_tensor(v) for v in quantizer.limits]
    if any(v.numel() > 1 for v in limits) or quantizer.scale.numel() > 1 or quantizer.granularity.kind != "tensor":
        raise _Refused("its input has a scale or a width per channel")
    low, high = (int(v) for v in limits)
    if high - low > 255 or low > 0:
        raise _Refused("its input has more than 8 bits")
    codes = torch.arange(low, high + 1)
    scale, zero = float(quantizer.scale), _whole(quantizer.zero_point)
    values = quantizer.dequantize(codes.reshape(1, -1, *[1] * 2)).flatten()
    if not torch.equal(values, (codes - zero).float() * torch.tensor(scale)):
        raise _Refused("its input's levels are no multiples of a number")
    return _bytes(quantizer, low), scale, zero


def _bytes(quantizer: Quantizer, low: int) -> Callable[[Tensor], Tensor]:
    """Returns a function from a tensor to its codes plus the offset, as bytes with channels innermost."""
    offset = int8.offset(low)
    plain = (GridQuantizer.codes, GridQuantizer.prepared, GridQuantizer.scale_and_zero)
    own = (
        (type(quantizer).codes, type(quantizer).prepared, type(quantizer).scale_and_zero)
        if isinstance(quantizer, GridQuantizer)
        else ()
    )
    edges = [torch.as_tensor(v) for v in getattr(quantizer, "edges", quantizer.limits)]
    if own == plain and quantizer.rounding == "half_even" and all(v.numel() == 1 for v in edges):
        numbers = (float(quantizer.scale), float(quantizer.zero_point), float(edges[0]), float(edges[1]), offset, 0)
        constants = torch.tensor(numbers, dtype=torch.float64)[:, None]
        return lambda x: regrid([x], [Step("grid", 0, 1, 0)], [torch.uint8], [constants])[0]
    return lambda x: (quantizer.codes(x) + offset).to(torch.uint8)


def _weight(layer: Quantized) -> tuple[Tensor, Tensor]:
    """Returns a layer's weight as int8 and the value of a code for each output channel."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, Quantizer):
        raise _Refused("its weight is not quantized")
    outputs, value = layer.weight.shape[0], layer.quantized_weight().double()
    codes = quantizer.codes(layer.weight).double()
    # read last: some methods measure the weight while they quantize it
    scale, zero = getattr(quantizer, "scale", None), getattr(quantizer, "zero_point", torch.zeros(1))
    if scale is None or quantizer.granularity.kind == "group" or scale.numel() not in (1, outputs):
        raise _Refused("its weight has no single scale per output channel")
    codes, step = codes - zero.double(), scale.detach().double()
    if not torch.equal(codes, codes.round()):  # no code for zero: odd multiples of half a step
        codes, step = 2 * codes, step / 2
    if codes.min() < -128 or codes.max() > 127:
        raise _Refused("its weight has more than 8 bits")
    if not torch.equal(codes, codes.round()):
        raise _Refused("its weight's zero is no code, nor half-way between two")
    if ((value - codes * step).abs() > _ROUNDING * value.abs().max()).any():
        raise _Refused("its weight's levels are no multiples of a number")
    weight = codes.to(torch.int8).reshape(*layer.weight.shape, *[1] * (4 - layer.weight.dim()))
    return weight.contiguous(), step.float().reshape(-1).expand(outputs).contiguous()


def _check_sums(weight: Tensor, low: int, high: int) -> None:
    """Raises where the sums of products would not be exact on this processor."""
    moved, most = high + int8.offset(low), int(weight.int().abs().max())
    if not int8.exact_pairs(moved, most):
        raise _Refused("this processor adds such products inexactly; codes of inputs up to 127 are exact")
    if int(weight[0].numel()) * moved * most >= 2**31:
        raise _Refused("its sums do not fit into 32 bits")


def _whole(zero: Tensor) -> int:
    if zero.numel() > 1 or not float(zero).is_integer():
        raise _Refused("its input has no code for zero")
    return int(zero)


@torch.no_grad()
def _share(model: nn.Module, example: Tensor, chosen: set[str]) -> float:
    """Returns the share of an image's products that the chosen layers compute."""
    counts = {True: 0, False: 0}

    def count(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, given: tuple, result: Tensor) -> None:
            per = (
                module.weight[0].numel()
                if not isinstance(module, nn.ConvTranspose2d)
                else module.weight.numel() // module.in_channels
            )
            counts[name in chosen] += result[0].numel() * per

        return hook

    weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, weighted)]
    with hooked(layer.register_forward_hook(count(name)) for name, layer in layers), evaluating(model):
        model(example[:1])
    return counts[True] / max(sum(counts.values()), 1)
