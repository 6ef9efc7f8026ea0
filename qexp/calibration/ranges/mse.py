"""The range with the least quantization error, found by search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.calibration.density import Density
from qexp.calibration.ranges.base import Context
from qexp.calibration.stats import TensorStats
from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid


@dataclass(frozen=True)
class MSE:
    """The range that minimises `mean |x - quantized x|^p` over evenly spaced shrinkings of the min-max range.

    Candidate i keeps the share `i / candidates` of the minimum and of the maximum alike; ties go to the wider range. The least share
    tried is `least`. For p = 2 the error is summed over levels from cumulative moments; other p visit each value or bin.

    Args:
        candidates: Number of steps N.
        p: Exponent of the error.
        least: Smallest share of the min-max range to try.

    Source: Nahshan et al. 2019 (arXiv 1911.07190); with p = 2.4 and shares 1.00 ... 0.21 as in Li et al. 2021 (arXiv 2102.05426).
    """

    candidates: int = 100
    p: float = 2.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.p <= 0 or not 0 <= self.least < 1:
            raise QexpError(
                f"MSE(candidates={self.candidates}, p={self.p}, least={self.least}): allowed are candidates >= 1, p > 0, 0 <= least < 1"
            )

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        if context.parameters is None:
            raise QexpError("MSE needs to know how a range becomes a scale (Context.parameters)")
        low, high = stats.min, stats.max
        if context.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        density = stats.density
        best = torch.full_like(high, torch.inf)
        share = torch.ones_like(high)
        for i in range(self.candidates, 0, -1):
            if i / self.candidates < self.least:
                break
            ratio = i / self.candidates
            scale, zero_point = context.parameters(low * ratio, high * ratio)
            error = self._error(density, scale.double(), zero_point.double(), grid)
            better = error < best
            best = torch.where(better, error, best)
            share = torch.where(better, torch.full_like(share, ratio), share)
        return low * share, high * share

    def _error(self, density: Density, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
        if self.p == 2:
            return grid_error(density, scale, zero_point, grid)
        qmin, qmax = _limits(grid)
        values, _ = density.points()
        codes = (values / scale[:, None] + zero_point[:, None]).round()
        codes = torch.maximum(torch.minimum(codes, qmax[:, None]), qmin[:, None])
        return density.lp_error((codes - zero_point[:, None]) * scale[:, None], self.p)


def grid_error(density: Density, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
    """Returns the summed squared error `[G]` of quantizing everything seen to `(codes - zero_point) * scale`, both `[G]` float64."""
    qmin, qmax = _limits(grid)
    codes = torch.arange(float(qmin.min()), float(qmax.max()) + 1, dtype=torch.float64)[None]
    codes = torch.maximum(
        torch.minimum(codes, qmax[:, None]), qmin[:, None]
    )  # narrower channels repeat their end levels
    return density.squared_error((codes - zero_point[:, None]) * scale[:, None])


def _limits(grid: UniformGrid) -> tuple[Tensor, Tensor]:
    qmin, qmax = (torch.as_tensor(q, dtype=torch.float64).flatten() for q in (grid.qmin, grid.qmax))
    return qmin, qmax
