"""A range that is known without statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.statistics.stats import TensorStats


@dataclass(frozen=True)
class Given:
    """Picks a fixed range that does not depend on the statistics, such as 0 to 255 for pixels or the limits of an interface.

    Args:
        low, high: One number each, or one per channel.

    >>> [end.tolist() for end in Given(0, [1, 2])(TensorStats.of(torch.zeros(1)), UniformGrid(8, signed=False), Context())]
    [[0.0, 0.0], [1.0, 2.0]]
    """

    low: float | Sequence[float]
    high: float | Sequence[float]

    def __post_init__(self) -> None:
        for name in ("low", "high"):  # tuples, which can be compared and hashed
            value = getattr(self, name)
            object.__setattr__(
                self, name, (float(value),) if isinstance(value, int | float) else tuple(map(float, value))
            )
        ends = torch.broadcast_tensors(torch.tensor(self.low), torch.tensor(self.high))
        if not bool((ends[0] < ends[1]).all()):
            raise QexpError(f"low={self.low}, high={self.high} is not allowed; each low must be below its high")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        low, high = torch.broadcast_tensors(
            torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        )
        return low.clone(), high.clone()
