"""Ranges that end at a power of two, given by the integer bits of a fixed-point number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.statistics.stats import TensorStats

_LEAST = -39  # ceil(log2(1e-12)): the value for the smallest tensors, all-zero tensors included
_EDGES = ("bump", "tight", "legacy")
_BEFORE_RELU = ("all", "positive")


def integer_bits(magnitude: Tensor, edge: str = "bump") -> Tensor:
    """Returns `sf`, the number of integer bits (sign excluded) for values up to `magnitude`: float64, same shape, at least -39.

    The format then holds `[-2^sf, 2^sf)`. The edges differ only where the magnitude is a power of two, `2^k`: `bump` gives k + 1, so
    that it does not saturate; `tight` gives k, one bit finer; `legacy` is `ceil(log2(magnitude + 1e-12))` in float64, which is k + 1 up
    to k = 10 and k above.

    >>> integer_bits(torch.tensor([0.24, 1.0, 3.7, 0.0])).tolist()
    [-2.0, 1.0, 2.0, -39.0]
    """
    magnitude = magnitude.double()
    if edge == "legacy":
        each = [math.ceil(math.log2(v + 1e-12)) for v in magnitude.flatten().tolist()]
        return torch.tensor(each, dtype=torch.float64).reshape(magnitude.shape)
    mantissa, exponent = torch.frexp(magnitude)
    if edge == "tight":
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(magnitude > 0, exponent, _LEAST).double().clamp_min(_LEAST)


@dataclass(frozen=True)
class PowerOfTwo:
    """Picks the range `[-2^sf, 2^sf]` that contains all but a share of the values.

    `sf = integer_bits(v)`, where v is the `int(overflow_rate * n)`-th greatest of n values `|x|` (0 = the maximum). From a histogram v is
    accurate to half a bin.

    Args:
        overflow_rate: Share of the values that may lie outside.
        pow2_edge: Rule for an exact power of two: `bump`, `tight` or `legacy` (see `integer_bits`).
        before_relu: Values that count for a tensor that goes straight into a ReLU: `all` of |x|, or `positive`, those that the ReLU
            passes. Where the negative values are the largest, `positive` leaves more fractional bits, which matters where products are
            rounded to the format.

    Source: the scaling factors of imagenet-cnn-quantization.
    Differs from the source: the rule for an exact power of two is the same at every size (`bump`); the order statistic of an activation
    is taken over all calibration images together, not as the greatest over single images.
    """

    overflow_rate: float = 0.0
    pow2_edge: Literal["bump", "tight", "legacy"] = "bump"
    before_relu: Literal["all", "positive"] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.overflow_rate < 0.5:
            raise QexpError(
                f"PowerOfTwo: overflow_rate={self.overflow_rate} is not allowed; use 0 <= overflow_rate < 0.5"
            )
        if self.pow2_edge not in _EDGES:
            raise QexpError(f"PowerOfTwo: pow2_edge={self.pow2_edge!r} is not allowed; use {', '.join(_EDGES)}")
        if self.before_relu not in _BEFORE_RELU:
            raise QexpError(
                f"PowerOfTwo: before_relu={self.before_relu!r} is not allowed; use {', '.join(_BEFORE_RELU)}"
            )
        if self.before_relu == "positive" and self.overflow_rate:
            raise QexpError(
                "PowerOfTwo: before_relu=positive looks at the maximum; set overflow_rate=0, or before_relu=all"
            )

    @property
    def needs_histogram(self) -> bool:
        return self.overflow_rate > 0

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        if self.overflow_rate:
            density = stats.density
            magnitude = density.absolute_order((self.overflow_rate * density.count + 1e-9).floor())
        elif self.before_relu == "positive" and context.followed_by_relu:
            magnitude = stats.max.clamp_min(0)
        else:
            magnitude = torch.maximum(stats.min.abs(), stats.max.abs())
        reach = torch.exp2(integer_bits(magnitude, self.pow2_edge))
        return -reach, reach
