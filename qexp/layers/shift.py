"""Convolutions and linear layers without multipliers: inputs are shifted by the exponents of the weights and added."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.per_product import padded
from qexp.layers.quantized import QuantConv2d, Quantized, QuantLinear
from qexp.quantizers.caq import CAQShift

NEGATIVE = ("exact", "right_shift", "zero", "legacy")
_NO_WEIGHT = 1e-5  # weights of smaller magnitude count as zero


def powers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sign and the exponent of each weight, float64, with exponent `round(log2|w|)`; the sign of a tiny weight is 0."""
    magnitude = weight.detach().double().abs()
    sign = torch.where(magnitude < _NO_WEIGHT, 0.0, torch.sign(weight.detach().double()))
    return sign, torch.where(sign != 0, torch.round(torch.log2(magnitude.clamp_min(1e-300))), 0.0)


def accumulate(layer: nn.Conv2d, codes: Tensor, sign: Tensor, shift: Tensor, negative_shift: str) -> Tensor:
    """Returns `sum sign * (codes << shift)` of a convolution, float64 (integers while they fit 53 bits).

    Args:
        layer: The layer that gives stride, padding, dilation and groups.
        codes: [N, C, H, W], integers as float64.
        sign, shift: [O, C / groups, kh, kw].
        negative_shift: Effect of a negative shift: `exact` keeps fractional bits, `right_shift` drops them (floor), `zero` drops the
            term, `legacy` shifts by 0, as if the weight were as large as the inflation.
    """
    codes, padding = padded(layer, codes)

    def conv(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, layer.stride, padding, layer.dilation, layer.groups)

    if negative_shift == "exact":
        return conv(codes, sign * torch.exp2(shift))
    if negative_shift == "legacy":
        return conv(codes, sign * torch.exp2(shift.clamp_min(0)))
    total = conv(codes, torch.where(shift < 0, 0.0, sign * torch.exp2(shift)))
    if negative_shift == "right_shift":
        for k in shift[(shift < 0) & (sign != 0)].unique().tolist():
            total = total + conv(torch.floor(codes * 2.0**k), torch.where(shift == k, sign, 0.0))
    return total


class Shift(Quantized):
    """A layer that computes on the integer codes of its input; each weight is a shift.

    `shift[o,i] = e[o,i] + Qout[o] + I - Qin[i]`, `acc = sum s (x_q << shift)`, result `acc * 2^-(Qout + I) + bias`. The next quantizer
    (after a batch norm, if there is one) rounds the result to `2^-Qout`. The exponents of input channels are absorbed exactly, so
    activations can have one scale per channel. Qin and Qout are the exponents of the quantizers before and after the layer;
    `qexp.recipe.plan.apply` links the layer to them. In training the layer computes as the ordinary one.

    Source: the shift engine of TF2-Engine.
    Differs from the source: negative shifts keep their fractional bits; there they are clamped to 0, which turns the weight into +-1.
    """

    _inflation, _negative_shift = 15, "exact"
    _ends: tuple[CAQShift | None, CAQShift | None] = (None, None)

    def configure(self, inflation: int = 15, negative_shift: str = "exact") -> None:
        """Sets the inflation I (extra bits below the output's last bit) and the effect of a negative shift."""
        if negative_shift not in NEGATIVE:
            raise QexpError(f"compute.negative_shift={negative_shift!r}; allowed are {', '.join(NEGATIVE)}")
        if not 0 <= inflation <= 30:
            raise QexpError(f"compute.inflation={inflation}; allowed are 0..30")
        self._inflation, self._negative_shift = inflation, negative_shift
        self.register_buffer("_largest", torch.zeros((), dtype=torch.float64), persistent=False)

    def link(self, name: str, arriving: Any, leaving: Any) -> None:
        """Sets the quantizers whose exponents are Qin and Qout; where the result stays float, Qout is 0."""
        if not isinstance(arriving, CAQShift) or not isinstance(leaving, CAQShift | None):
            raise QexpError(
                f"{name}: a shift layer needs power-of-two exponents (CAQShift) on its input and output, got "
                f"{type(arriving).__name__} and {type(leaving).__name__}; use CAQShift there, or set compute: null for this layer"
            )
        self._ends = (arriving, leaving)

    def shifts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sign and the shift of each weight, both float64 `[O, I, kh, kw]`."""
        arriving, _ = self._ends
        if arriving is None:
            raise QexpError(
                "a shift layer ran before it was linked to the quantizers around it; attach quantizers with qexp.recipe.plan.apply, or "
                "link layers that you swapped by hand with qexp.network.linking.link"
            )
        sign, exponent = powers(weight)
        if exponent.ndim == 2:
            exponent, sign = exponent[:, :, None, None], sign[:, :, None, None]
        groups = getattr(self, "groups", 1)
        channels = exponent.shape[1] * groups
        qin = _spread(arriving.exponents, channels).to(exponent)
        qin = qin.reshape(groups, -1).repeat_interleave(len(exponent) // groups, 0)[:, :, None, None]
        return sign, exponent + self._qout(len(exponent)).to(exponent) + self._inflation - qin

    def _qout(self, outputs: int) -> Tensor:
        leaving = self._ends[1]
        exponents = leaving.exponents if leaving is not None else torch.zeros(1)
        return _spread(exponents, outputs).double().reshape(-1, 1, 1, 1)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the integer codes of the arriving tensor `[N, C, ...]`, float64."""
        qin = _spread(self._ends[0].exponents, x.shape[1]).to(x.device, torch.float64)
        return torch.round(x.double() * torch.exp2(qin).reshape(1, -1, *[1] * (x.ndim - 2)))

    def shifted(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: nn.Conv2d) -> Tensor:
        """Returns the result of the accumulators for an input `[N, C, H, W]`."""
        sign, shift = self.shifts(weight)
        total = accumulate(geometry, self.codes(x), sign, shift, self._negative_shift)
        self._largest = torch.maximum(self._largest, total.detach().abs().amax())
        down = torch.exp2(-self._qout(len(sign)).to(total) - self._inflation).reshape(1, -1, 1, 1)
        y = (total * down).to(x.dtype)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)

    def account(self) -> dict[str, float]:
        """Returns the number of weights with a negative shift, and the bits of the largest accumulator so far, sign included."""
        sign, shift = self.shifts(self.quantized_weight())
        bits = math.ceil(math.log2(float(self._largest) + 1)) + 1
        return {"negative_shifts": int(((shift < 0) & (sign != 0)).sum()), "accumulator_bits": bits}


class ShiftConv2d(Shift, QuantConv2d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.training:
            return QuantConv2d.compute(self, x, weight, bias)
        return self.shifted(x, weight, bias, self)


class ShiftLinear(Shift, QuantLinear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.training:
            return QuantLinear.compute(self, x, weight, bias)
        if x.ndim != 2:
            raise QexpError(
                f"a shift linear layer takes [N, features], got {list(x.shape)}; set compute: null for this layer"
            )
        return self.shifted(x[:, :, None, None], weight, bias, _POINT)[:, :, 0, 0]


_POINT = nn.Conv2d(1, 1, 1)  # the geometry of a linear layer


def _spread(exponents: Tensor, channels: int) -> Tensor:
    """Returns the exponents expanded to `channels`: one for all, or one per channel of a flattened map, repeated per position."""
    if channels % len(exponents):
        raise QexpError(f"the input quantizer has {len(exponents)} exponents, which do not divide {channels} channels")
    return exponents.repeat_interleave(channels // len(exponents))


FAMILY: dict[type[nn.Module], type[Quantized]] = {nn.Conv2d: ShiftConv2d, nn.Linear: ShiftLinear}
