"""Activations on powers of two: each level is half of the next one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import AffineQuantizer, fit_range
from qexp.ranges import Context, MinMax, RangeRule
from qexp.statistics.stats import TensorStats

_LEAST_CLIP = 1e-12
_VANISHED = -200  # an exponent whose power of two is zero in float32


class _Powers(torch.autograd.Function):
    """The given values; the gradient passes strictly inside the clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, clip: Tensor, two_sided: bool) -> Tensor:
        ctx.save_for_backward((x > (-clip if two_sided else 0)) & (x < clip))
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class Exponential(AffineQuantizer):
    """`T 2^(e - n)` with `e = min(round(log2(x / a0)), n)`, `a0 = T / 2^n`; zero where x <= 0 or e < 1.

    Levels: {0, T 2^(1-n), ..., T/2, T}, 2^bits of them for n = 2^bits - 1; the codes are 0 and e. Two-sided (tensors with negatives):
    the same with both signs and n = 2^(bits-1) - 1, so 2^bits - 1 levels. Ties of the logarithm go to the even exponent. The error
    grows with the value and is not bounded by half a step. Gradient: 1 strictly inside `0 < x < T` (`|x| < T`), else 0. T comes from a
    number or a range rule and does not change. Saved: T (as `clip`), the grid's limits. Above 6 bits the lowest levels are 0 in float32.

    Args:
        bits, shape, granularity, rounding: See `AffineQuantizer`; one T per tensor, half to even.
        signed: False is one-sided, True two-sided, `auto` two-sided if the tensor has negative values.
        range: T: a number, or a range rule whose upper end is T.
        form: `house`, or `source`: no lower bound on e, and the sign dropped; its levels have no end towards zero.

    Source: Quantized_ResNet.
    Differs from the source: a lower bound on e, so that the levels are 2^bits; zero for x <= 0; two-sided tensors.

    >>> q = Exponential(2, (3,), signed=False, range=2.0)
    >>> q.fit(TensorStats.of(torch.tensor([0.0, 2.0])))
    >>> q(torch.tensor([-0.5, 0.05, 0.3, 0.7, 1.1, 1.9, 6])).tolist()
    [0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 2.0]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    sites = frozenset({"input", "output"})
    bits_allowed = (1, 6)
    granularities = ("tensor",)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        range: float | RangeRule | None = None,
        form: Literal["house", "source"] = "house",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, narrow=True, **common)
        if form not in ("house", "source"):
            raise QexpError(f"Exponential: form={form!r}; allowed are house, source")
        number = isinstance(range, float | int)
        if number and not range > 0:
            raise QexpError(f"Exponential: range={range} is not allowed; use a positive number or a range rule")
        if form == "source":
            self.properties = frozenset({"needs_calibration"})
        self.form, self.range = form, MinMax() if range is None else range
        self.register_buffer("clip", torch.tensor(float(range) if number else 1.0))

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        if self.form == "source":
            self.take_sign(False)
        else:
            self.follow_sign(stats, followed_by_relu)
        if not isinstance(self.range, float | int):
            _, high = fit_range(self, self.range, stats, Context(True, followed_by_relu, self._parameters_of))
            self.clip.fill_(max(float(high.max()), _LEAST_CLIP))
        self.mark_ready()

    def _parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = high / self.grid.qmax
        return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)

    @property
    def limits(self) -> tuple[int, int]:
        qmin, qmax = super().limits
        return (_VANISHED, qmax) if self.form == "source" else (qmin, qmax)

    @property
    def scale(self) -> Tensor:
        """T / n: the mean distance of the levels, `[]`."""
        return self.clip / self.limits[1]

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.clip)

    def forward(self, x: Tensor) -> Tensor:
        values = self.dequantize(self.codes(x))
        return _Powers.apply(x, values, self.clip, self.limits[0] < 0 and self.form == "house")

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        qmin, n = self.limits
        x = x.detach().float()
        exponent = torch.round(torch.log2(x.abs() / (self.clip * 2.0**-n))).clamp_max(n)
        if self.form == "source":
            return exponent.clamp_min(_VANISHED)
        return torch.where(exponent < 1, 0.0, exponent) * (torch.sign(x) if qmin < 0 else (x > 0).float())

    def dequantize(self, codes: Tensor) -> Tensor:
        codes, n = codes.float(), self.limits[1]
        if self.form == "source":
            return self.clip * 2.0**-n * torch.exp2(codes)
        return torch.sign(codes) * self.clip * torch.exp2(codes.abs() - n)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"clip from {self.range_name()}, {self.form}"}
