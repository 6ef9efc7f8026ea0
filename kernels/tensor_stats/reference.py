"""Statistics of a tensor in plain PyTorch (in as many passes as it takes)."""

import torch
from torch import Tensor

from ..layout import wide


def forward(
    x: Tensor, axis: int | None, center: Tensor | None, low: Tensor | None, width: Tensor | None, bins: int
) -> tuple[Tensor, Tensor]:
    """Returns [8, C] float64 moments and [C, bins] int64 counts; see `tensor_stats`."""
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    rows = wide(rows)
    channels, count = rows.shape
    exact = rows.to(torch.float64)
    middle = exact.new_zeros(1) if center is None else center.to(torch.float64)
    zero, infinite = rows == 0, ~rows.isfinite()
    moments = torch.stack(
        [
            exact.new_full((channels,), count),
            zero.sum(1).double(),
            infinite.sum(1).double(),
            exact.amin(1) if count else exact.new_full((channels,), torch.inf),
            exact.amax(1) if count else exact.new_full((channels,), -torch.inf),
            exact.sum(1),
            exact.square().sum(1),
            (exact - middle.reshape(-1, 1)).abs().sum(1),
        ]
    )
    histogram = x.new_zeros((channels, bins), dtype=torch.int64)
    if bins:
        position = torch.floor((rows - low.reshape(-1, 1)) / width.reshape(-1, 1))
        counted = ~(zero | infinite | position.isnan())
        index = torch.where(counted, position.clamp(0, bins - 1), 0).to(torch.int64)
        histogram.scatter_add_(1, index, counted.to(torch.int64))
    return moments, histogram
