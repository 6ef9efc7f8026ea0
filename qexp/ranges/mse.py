"""The range with the least quantization error, found by a search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.statistics.density import Density
from qexp.statistics.stats import TensorStats

_AT_ONCE = 2**16  # number of levels whose errors are summed at once; they fit into a fast cache


@dataclass(frozen=True)
class MSE:
    """Picks the range that minimises `mean |x - quantized x|^p` among evenly spaced shrunken versions of the min-max range.

    Candidate i multiplies both the minimum and the maximum by `i / candidates`. Ties go to the wider range. The smallest factor is
    `least`. For p = 2 the error is summed over levels from cumulative moments; for other p it is summed over each value or bin.

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
                f"MSE: candidates={self.candidates}, p={self.p}, least={self.least} is not allowed; use candidates >= 1, p > 0 and "
                "0 <= least < 1"
            )

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        if context.parameters is None:
            raise QexpError("MSE needs a quantizer that computes a scale from a range (Context.parameters)")
        low, high = stats.min, stats.max
        if context.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        ratios = [i / self.candidates for i in range(self.candidates, 0, -1) if i / self.candidates >= self.least]
        shares = torch.tensor(ratios, dtype=low.dtype)
        scale, zero_point = context.parameters(low * shares[:, None], high * shares[:, None])
        error = self._errors(stats.density, scale.double(), zero_point.double(), grid)
        best = torch.where(error.isnan(), torch.inf, error).argmin(0)  # the first of equals
        return low * shares[best], high * shares[best]

    def _errors(self, density: Density, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
        """Returns the error of each candidate `[N, G]`."""
        if self.p == 2:
            return grid_errors(density, scale, zero_point, grid)
        return torch.stack([self._error(density, *candidate, grid) for candidate in zip(scale, zero_point)])

    def _error(self, density: Density, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
        qmin, qmax = _limits(grid)
        values, _ = density.points()
        codes = (values / scale[:, None] + zero_point[:, None]).round()
        codes = torch.maximum(torch.minimum(codes, qmax[:, None]), qmin[:, None])
        return density.lp_error((codes - zero_point[:, None]) * scale[:, None], self.p)


def grid_errors(density: Density, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
    """Returns the summed squared errors `[N, G]` of quantizing all values to `(codes - zero_point) * scale`, both `[N, G]` float64."""
    qmin, qmax = _limits(grid)
    codes = torch.arange(float(qmin.min()), float(qmax.max()) + 1, dtype=torch.float64)[None]
    # Narrower channels repeat their end levels.
    codes = torch.maximum(torch.minimum(codes, qmax[:, None]), qmin[:, None])
    at_once = max(1, _AT_ONCE // (scale.shape[1] * codes.shape[1]))
    return torch.cat(
        [
            density.squared_error(((codes - z[..., None]) * s[..., None]).transpose(0, 1)).T
            for s, z in zip(scale.split(at_once), zero_point.split(at_once))
        ]
    )


def _limits(grid: UniformGrid) -> tuple[Tensor, Tensor]:
    qmin, qmax = (torch.as_tensor(q, dtype=torch.float64).flatten() for q in (grid.qmin, grid.qmax))
    return qmin, qmax
