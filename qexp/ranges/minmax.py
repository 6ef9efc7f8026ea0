"""Ranges from extremes: of all values, averaged over batches, or as an exponential moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.statistics.stats import TensorStats


@dataclass(frozen=True)
class MinMax:
    """Picks the observed minimum and maximum as the range.

    Args:
        over: `all` uses the extremes of all values; `batches` the mean over batches of each batch's extremes; `samples` the mean over
            samples of each sample's extremes. The means cut off outliers.

    Source: Banner et al. 2019 (arXiv 1810.05723), the statistics kinds `extreme`, `mean` and `batch average` of its experiments.
    """

    over: Literal["all", "batches", "samples"] = "all"
    needs_histogram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.over not in ("all", "batches", "samples"):
            raise QexpError(f"MinMax: over={self.over!r} is not allowed; use all, batches or samples")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        if self.over == "all":
            return stats.min, stats.max
        low, high = (
            (stats.batch_min, stats.batch_max) if self.over == "batches" else (stats.sample_min, stats.sample_max)
        )
        return low.mean(0), high.mean(0)


@dataclass(frozen=True)
class MovingAverage:
    """Picks the exponential moving average of each batch's extremes, in the order of the batches.

    Args:
        momentum: Weight of the newest batch.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.1.
    """

    momentum: float = 0.1
    needs_histogram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise QexpError(f"MovingAverage: momentum={self.momentum} is not allowed; use 0 < momentum <= 1")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        low, high = stats.batch_min[0], stats.batch_max[0]
        for batch_low, batch_high in zip(stats.batch_min[1:], stats.batch_max[1:]):
            low = torch.lerp(low, batch_low, self.momentum)
            high = torch.lerp(high, batch_high, self.momentum)
        return low, high


@dataclass(frozen=True)
class Fixed:
    """Picks a fixed range that does not depend on the statistics.

    Args:
        low: Least value to represent.
        high: Greatest value to represent.
    """

    low: float
    high: float
    needs_histogram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise QexpError(f"Fixed: low={self.low}, high={self.high} is not allowed; low must be below high")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        return torch.full_like(stats.min, self.low), torch.full_like(stats.max, self.high)
