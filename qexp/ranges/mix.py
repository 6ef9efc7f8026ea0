"""Selects the range with the least error on the calibration images from several candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.ranges.mse import grid_errors
from qexp.statistics.stats import TensorStats


def least_error(
    candidates: Sequence[tuple[Tensor, Tensor]], stats: TensorStats, grid: UniformGrid, context: Context
) -> tuple[Tensor, Tensor]:
    """Returns, for each group, the candidate `(low, high)` `[G]` with the least squared error; the first one on a tie.

    The part that a ReLU cuts off adds the same error to every half range, so it does not affect the choice.

    Raises:
        QexpError: The errors cannot be measured: calibration kept no histogram, or `context` has no `parameters`.
    """
    if context.parameters is None:
        raise QexpError(
            "clip kind mix compares measured errors, so it needs a quantizer that computes a scale from a range"
        )
    low, high = (torch.stack(ends) for ends in zip(*candidates))
    scale, zero_point = context.parameters(low, high)
    errors = grid_errors(stats.density, scale.double(), zero_point.double(), grid)
    best = errors.argmin(0)[None]
    return low.gather(0, best)[0], high.gather(0, best)[0]
