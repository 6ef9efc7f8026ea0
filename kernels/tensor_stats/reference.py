"""Statistics of a tensor in plain PyTorch (in several passes)."""

import torch
from torch import Tensor

from ..layout import wide

_PIECE = 2**16  # elements per piece: their float64 copies stay in the cache


def forward(
    x: Tensor,
    axis: int | None,
    center: Tensor | None,
    first: Tensor | None,
    width: Tensor | None,
    bins: int,
    powers: bool,
) -> tuple[Tensor, Tensor]:
    """Returns [14, C] float64 moments and [C, bins] int64 counts; see `tensor_stats`."""
    rows = (
        x.reshape(1, -1)
        if axis is None
        else x.movedim(axis, 0).reshape(x.shape[axis], x.numel() // max(x.shape[axis], 1))
    )
    rows = wide(rows)
    channels, count = rows.shape
    moments = rows.new_zeros((14, channels), dtype=torch.float64)
    moments[0], moments[3], moments[4] = count, torch.inf, -torch.inf
    histogram = x.new_zeros((channels, bins), dtype=torch.int64)
    given = [None if p is None else p.reshape(-1, 1).expand(channels, 1) for p in (center, first, width)]
    deep = max(1, _PIECE // max(count, 1))
    for at in range(0, channels if count else 0, deep):
        here = slice(at, at + deep)
        middle, begin, step = (None if p is None else p[here] for p in given)
        for part in rows[here].split(_PIECE, 1):
            if powers:
                _add_powers(part, moments[:, here])
            if center is not None:
                moments[13, here] += (part.double() - middle.double()).abs().sum(1)
            if bins:
                _count(part, begin, step, histogram[here])
    if powers and center is None:
        moments[13] = moments[9]
    return moments, histogram


def _add_powers(rows: Tensor, moments: Tensor) -> None:
    """Adds the contribution of [R, n] values to [14, R] moments, in place; count and deviation stay unchanged."""
    exact = rows.double()
    square, positive = exact.square(), exact.clamp_min(0)
    moments[1] += (rows == 0).sum(1)
    moments[2] += (~rows.isfinite()).sum(1)
    moments[3] = torch.minimum(moments[3], exact.amin(1))
    moments[4] = torch.maximum(moments[4], exact.amax(1))
    moments[10] += (rows > 0).sum(1)
    sums = (exact, square, square * exact, square * square, exact.abs())
    for row, values in zip((5, 6, 7, 8, 9, 11, 12), (*sums, positive, positive.square()), strict=True):
        moments[row] += values.sum(1)


def _count(rows: Tensor, first: Tensor, width: Tensor, histogram: Tensor) -> None:
    """Adds [R, n] values to [R, bins] counts, in place."""
    position = torch.floor(rows / width) - first
    counted = ~((rows == 0) | ~rows.isfinite() | position.isnan())
    index = torch.where(counted, position.clamp(0, histogram.shape[1] - 1), 0).to(torch.int64)
    histogram.scatter_add_(1, index, counted.to(torch.int64))
