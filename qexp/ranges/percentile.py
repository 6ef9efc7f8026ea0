"""Ranges from order statistics, which cut off the largest values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.statistics.stats import TensorStats


@dataclass(frozen=True)
class Percentile:
    """Picks the range that leaves a share of the values outside; its ends are order statistics, never interpolated.

    With `r = 1 - percentile` and n values, a symmetric range ends at the `int(r * n)`-th greatest `|x|` (0 = the maximum); a
    two-sided one at the `int(r * n)`-th least and greatest value. From a histogram the result is accurate to half a bin.

    Args:
        percentile: Share of the values to keep, such as 0.999, 0.9999, 0.99999; 1 is min-max.

    Source: imagenet-cnn-quantization's overflow rate; Wu et al. 2020 (arXiv 2004.09602), section 4.
    """

    percentile: float = 0.9999

    def __post_init__(self) -> None:
        if not 0.5 < self.percentile <= 1:
            raise QexpError(
                f"Percentile: percentile={self.percentile} is not allowed; use 0.5 < percentile <= 1 (0.999 keeps 99.9 %)"
            )

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        density = stats.density
        # 1e-9 of a value is added so that 0.001 * 1000 is 1 for either rounding of 1 - 0.999
        rank = ((1 - self.percentile) * density.count + 1e-9).floor()
        if context.symmetric:
            alpha = density.absolute_order(rank)
            return -alpha, alpha
        return density.order(rank), density.order(density.count - 1 - rank)
