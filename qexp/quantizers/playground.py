"""Per-tensor quantizers of pytorch-playground: levels evenly spaced in x, in log|x| or in tanh x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.numerics.ops import round_to
from qexp.quantizers.base import ROUNDINGS, Quantizer
from qexp.ranges import Context, MinMax, RangeRule
from qexp.ranges.base import rule_or
from qexp.ranges.power_of_two import integer_bits
from qexp.statistics.collectors import LeastMagnitude
from qexp.statistics.stats import TensorStats

_ROUNDINGS = ("half_up", *(rounding for rounding in ROUNDINGS if rounding != "half_up"))  # the first is the default
_FLOOR = 1e-20  # smaller magnitudes count as this in the logarithm


class _Playground(Quantizer):
    """Common base of the three methods: one scale per tensor."""

    granularities = ("tensor",)
    roundings = _ROUNDINGS

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True}


class MinMaxLevels(_Playground):
    """`x^ = min + round(n clip((x - min) / (max - min), 0, 1)) (max - min) / n` with `n = 2^bits - 1`: even levels from end to end.

    Levels: 2^bits. Ties: half up. Gradient: 1 within the range (limits included), else 0. Saved: the step and the least level. Zero is
    not a level in general. The error bound of half a step fails where float32 does not resolve the step (a narrow range far from zero).
    Constant tensors pass unchanged.

    Args:
        bits, shape, granularity, rounding: As for every quantizer; per tensor.
        range: Range rule that gives the ends.

    Source: the `minmax` method of pytorch-playground.
    Differs from the source: ranges of activations are calibrated, not taken from each batch; one bit gives both ends.

    >>> q = MinMaxLevels(3, (5,))
    >>> x = torch.tensor([-1, -0.2, 0.1, 0.5, 2])
    >>> q.fit(TensorStats.of(x))
    >>> q.codes(x).int().tolist()
    [0, 2, 3, 4, 7]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        range: RangeRule | None = None,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        self.range = rule_or(range, MinMax())
        self.register_buffer("low", torch.zeros(1))

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        low, high = self.range(stats, UniformGrid(self.bits, signed=False), Context(False, followed_by_relu))
        span = (high - low) / self.limits[1]
        self.scale.copy_(torch.where(span > 0, span, 1.0).clamp_min(torch.finfo(torch.float32).tiny))
        self.low.copy_(low)
        self.zero_point.copy_(-self.low / self.scale)
        self.mark_ready()

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return round_to(self._place(x.detach()).clamp(*self.limits), self.rounding)

    def _place(self, x: Tensor) -> Tensor:
        return (x.float() - self.low) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        return _Curved.apply(x, self.dequantize(self.codes(x)), self._slope)

    def _slope(self, x: Tensor, value: Tensor) -> Tensor:
        place = self._place(x)
        return ((place >= 0) & (place <= self.limits[1])).float()

    def dequantize(self, codes: Tensor) -> Tensor:
        return codes.float() * self.scale + self.low


class LogLevels(_Playground):
    """`x^ = sign(x) exp(v)` with v the nearest of even levels in `ln|x|`; zero is a level of its own.

    Levels: 2^bits - 1: zero and `2^(bits-1) - 1` magnitudes of each sign, from the least observed magnitude to the greatest (`minmax`),
    or at multiples of a power of two (`fixed_point`); multiples above the greatest magnitude are not used. Ties: half up, in the
    logarithm; a value below half of the least level becomes zero. Gradient: `x^ / x` from the least level to the greatest, else 0. Saved:
    the magnitudes and the limits between them. There is no error bound of half a step, since the distance of levels grows with them.
    Constant tensors pass unchanged.

    Args:
        bits: 2..16; one bit would be a sign without a magnitude.
        shape, granularity, rounding: As for every quantizer; per tensor, half_up only.
        spacing: `minmax` or `fixed_point`.
        zero: `own`; or `source`: the logarithm of zero is that of 1e-20, so the levels of a tensor with zeros start there, and zero is a
            level in addition to 2^(bits-1) magnitudes.

    Source: the `log` and `log_linear` methods of pytorch-playground.
    Differs from the source: `zero: own`; ranges of activations are calibrated, not taken from each batch.

    >>> q = LogLevels(3, (5,))
    >>> x = torch.tensor([-1.0, 0.0, 0.01, 0.09, 0.5])
    >>> q.fit(TensorStats.of(x))
    >>> q.codes(x).int().tolist()
    [-3, 0, 1, 2, 3]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    bits_allowed = (2, 16)
    roundings = ("half_up",)  # limits between levels
    needs_histogram = False
    collectors = (LeastMagnitude(),)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        spacing: str = "minmax",
        zero: str = "own",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if spacing not in ("minmax", "fixed_point"):
            raise QexpError(f"LogLevels: spacing={spacing!r}; allowed are minmax, fixed_point")
        if zero not in ("own", "source"):
            raise QexpError(f"LogLevels: zero={zero!r}; allowed are own, source")
        self.spacing, self.zero = spacing, zero
        self.count = 2 ** (bits - 1) - (zero == "own")  # magnitudes
        self.register_buffer("magnitudes", torch.zeros(self.count))
        self.register_buffer("between", torch.zeros(self.count))  # limits below each magnitude

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        greatest = float(torch.maximum(stats.min.abs(), stats.max.abs()).max())
        least = float(stats.extra["least_magnitude"]) if "least_magnitude" in stats.extra else _least(stats)
        if self.zero == "source" and float(stats.zeros.sum()):
            least = 0.0
        low, high = (math.log(max(v, _FLOOR)) for v in (min(least, greatest), greatest))
        if self.spacing == "minmax":
            step = (high - low) / max(self.count - 1, 1)
        else:
            sf = float(integer_bits(torch.tensor([max(abs(low), abs(high))])))
            step = 2.0 ** (sf - self.bits + 2)  # bits - 1 are left beside the sign of x
            low = -(2.0**sf)
        places = torch.arange(self.count, dtype=torch.float64)
        step = step if step > 0 else 1.0
        top = torch.finfo(torch.float32).max
        self.magnitudes.copy_((low + places * step).exp().clamp_max(top))
        self.between.copy_((low + (places - 0.5) * step).exp().clamp_max(top))
        self.between[0] = self.magnitudes[0] / 2 if self.zero == "own" else 0.0
        self.scale.fill_(max(greatest, _FLOOR) / self.count)
        self.mark_ready()

    @property
    def limits(self) -> tuple[int, int]:
        return -self.count, self.count

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        x = x.detach().float().contiguous()
        codes = torch.bucketize(x.abs(), self.between, right=True).clamp_max(self.count)
        return torch.sign(x).int() * codes.int()

    def dequantize(self, codes: Tensor) -> Tensor:
        values = torch.cat([self.magnitudes.new_zeros(1), self.magnitudes])[codes.abs().long()]
        return torch.sign(codes) * values

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        return _Curved.apply(x, self.dequantize(self.codes(x)), self._slope)

    def _slope(self, x: Tensor, value: Tensor) -> Tensor:
        inside = (x.abs() >= self.magnitudes[0]) & (x.abs() <= self.magnitudes[-1])
        return torch.where(inside, value / x, 0.0)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": self.spacing}


def _least(stats: TensorStats) -> float:
    """Returns the least magnitude that is not zero, from the values or the histogram."""
    values, weights = stats.density.points()
    magnitude = values.abs()[(weights > 0) & (values != 0)]
    return float(magnitude.min()) if len(magnitude) else 0.0


class TanhLevels(_Playground):
    """`x^ = artanh(v)` with `v = 2 round(n (tanh x + 1) / 2) / n - 1`, `n = 2^bits - 1`, held at `|v| <= 1 - 1/n`.

    Levels: 2^bits, dense around zero; zero is none. Ties: half up. Gradient: `(1 - tanh(x)^2) / (1 - v^2)`, at the end levels 0.
    No calibration: the levels are the same for every tensor, up to about +-3 at 8 bits. Saved: only their ends. There is no error bound
    of half a step (the distance of levels grows). Not idempotent: the least level lies on a tie.

    Args:
        bits: 2..16; with one bit both levels would be zero.
        shape, granularity, rounding: As for every quantizer; per tensor, half_up only.

    Source: the `tanh` method of pytorch-playground.
    Differs from the source: its end levels are infinite.

    >>> q = TanhLevels(4)
    >>> [round(v, 6) for v in q(torch.tensor([-0.6, -0.1, 0.3, 0.9])).tolist()]
    [-0.693147, -0.066766, 0.346574, 0.935901]
    """

    properties = frozenset({"monotone"})
    bits_allowed = (2, 16)
    roundings = ("half_up",)  # limits between levels
    needs_histogram = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        n = self.limits[1]
        self.scale.fill_(2 * math.atanh(1 - 1 / n) / n)  # the mean distance of levels
        self.zero_point.fill_(n / 2)
        v = (2 * torch.arange(n + 1, dtype=torch.float64) / n - 1).clamp(-1 + 1 / n, 1 - 1 / n)
        between = torch.atanh((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1)
        self.register_buffer("values", torch.atanh(v).float(), persistent=False)
        self.register_buffer("between", between.float(), persistent=False)

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    def codes(self, x: Tensor) -> Tensor:
        return torch.bucketize(x.detach().float().contiguous(), self.between, right=True).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.values[codes.long()]

    def forward(self, x: Tensor) -> Tensor:
        return _Curved.apply(x, self.dequantize(self.codes(x)), self._slope)

    def _slope(self, x: Tensor, value: Tensor) -> Tensor:
        slope = (1 - torch.tanh(x).square()) / (1 - torch.tanh(value).square())
        return torch.where(value.abs() < self.values[-1], slope, 0.0)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": "none"}


class _Curved(torch.autograd.Function):
    """Replaces `x` by a value; NaN stays NaN; the gradient is `slope(x, value)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, value)
        ctx.slope = slope
        return torch.where(x.isnan(), x, value.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, value = ctx.saved_tensors
        return grad * ctx.slope(x.float(), value).to(grad.dtype), None, None
