"""A mergeable histogram, one row per group, whose bin widths are powers of two.

The width of a bin is `2^exponent`, and bin edges lie at multiples of it. When a new value falls outside, neighbouring bins are joined in
pairs until all values fit. Therefore counts stay exact, the order does not matter, and two histograms always merge exactly (at the
coarser of the two widths). No first pass over the data is needed to find the range.
"""

from __future__ import annotations

from typing import Any

import torch
from qexp_kernels import tensor_stats
from torch import Tensor

_EMPTY = -(2**30)  # exponent of a row without values
_LEAST = -126  # float32 scales exactly by powers of two down to here; denormals share a bin


class Histogram:
    """Counts of the values seen, `[G, bins]`; at least half of the bins span the observed range.

    Args:
        groups: G, the number of rows.
        bins: Number of bins per row.
    """

    def __init__(self, groups: int, bins: int) -> None:
        self.bins = bins
        self.counts = torch.zeros(groups, bins, dtype=torch.int64)
        self.exponent = torch.full((groups,), _EMPTY, dtype=torch.int64)
        self.start = torch.zeros(groups, dtype=torch.int64)

    @property
    def width(self) -> Tensor:
        """Bin width of each row, `[G]` float64 (0 for a row without values)."""
        return torch.where(self.exponent == _EMPTY, 0.0, torch.exp2(self.exponent.double()))

    @property
    def low(self) -> Tensor:
        """Left edge of the first bin, `[G]` float64."""
        return self.start.double() * self.width

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Counts the nonzero values of float32 `rows` `[G, n]` with extremes `low` and `high` `[G]`; zeros are not counted here."""
        if rows.numel() == 0:
            return
        given = self.room_for(low, high, rows.device)
        self.counts += tensor_stats(rows, axis=0, center=rows.new_zeros(1), powers=False, **given).histogram.cpu()

    def room_for(self, low: Tensor, high: Tensor, device: torch.device) -> dict[str, Any]:
        """Makes room for values from `low` to `high` `[G]`; returns the bin arguments of `qexp_kernels.tensor_stats`."""
        low, high, begin = low.double().cpu(), high.double().cpu(), self.low
        if not bool(((low >= begin) & (high < begin + self.bins * self.width)).all()):
            self._make_room(low, high)
        # a division by a power of two is exact in float32, so every value falls between the edges of its bin
        width = torch.exp2(self.exponent.clamp_min(_LEAST).double()).float().to(device)
        return {"first": self.start.float().to(device), "width": width, "bins": self.bins}

    def merge(self, other: Histogram) -> None:
        """Adds the counts of another histogram of the same shape."""
        seen = other.exponent != _EMPTY
        low, high = other._extent()
        self._make_room(torch.where(seen, low, torch.nan), torch.where(seen, high, torch.nan), other.exponent)
        self.counts += other._moved(self.exponent, self.start)

    def edges(self, group: int = 0) -> Tensor:
        """Returns the `bins + 1` edges of one row."""
        return self.low[group] + self.width[group] * torch.arange(self.bins + 1, dtype=torch.float64)

    def _extent(self) -> tuple[Tensor, Tensor]:
        """Returns the least and the greatest value that the non-empty bins may hold (just inside the right edge)."""
        filled = self.counts > 0
        first = filled.int().argmax(dim=1)
        last = self.bins - 1 - filled.flip(1).int().argmax(dim=1)
        return (self.start + first).double() * self.width, (self.start + last + 0.5).double() * self.width

    def _make_room(self, low: Tensor, high: Tensor, least: Tensor | None = None) -> None:
        """Widens the bins, where needed, so that `[low, high]` fits as well; NaN leaves a row unchanged."""
        seen, asked = self.exponent != _EMPTY, ~torch.isnan(low)
        old_low, old_high = self._extent()
        new_low = torch.where(seen & asked, torch.minimum(old_low, low), torch.where(asked, low, old_low))
        new_high = torch.where(seen & asked, torch.maximum(old_high, high), torch.where(asked, high, old_high))
        span = torch.maximum(new_high - new_low, torch.maximum(new_low.abs(), new_high.abs()) * 2.0**-20).clamp_min(
            1e-300
        )
        exponent = torch.ceil(torch.log2(span / (self.bins - 1))).clamp_min(_LEAST).long()
        if least is not None:
            exponent = torch.maximum(exponent, torch.where(asked, least, exponent))
        exponent = torch.where(seen, torch.maximum(exponent, self.exponent), exponent)
        for _ in range(2):  # the floor of both ends may touch one bin too many
            width = torch.exp2(exponent.double())
            exponent += (torch.floor(new_high / width) - torch.floor(new_low / width) >= self.bins).long()
        exponent = torch.where(seen | asked, exponent, torch.full_like(exponent, _EMPTY))
        start = torch.floor(torch.nan_to_num(new_low) / torch.exp2(exponent.clamp_min(_LEAST).double())).long()
        start = torch.where(seen | asked, start, torch.zeros_like(start))
        self.counts = self._moved(exponent, start)
        self.exponent, self.start = exponent, start

    def _moved(self, exponent: Tensor, start: Tensor) -> Tensor:
        """Returns the counts moved into bins of another start and another (not smaller) width."""
        seen = (self.exponent != _EMPTY)[:, None]
        shift = torch.where(seen, (exponent - self.exponent)[:, None], 0).clamp(0, 62)
        index = ((self.start[:, None] + torch.arange(self.bins)) >> shift) - start[:, None]
        keep = (self.counts > 0) & (index >= 0) & (index < self.bins)
        moved = torch.zeros_like(self.counts)
        moved.scatter_add_(1, index.clamp(0, self.bins - 1), torch.where(keep, self.counts, 0))
        return moved

    def state(self) -> dict[str, Tensor]:
        """Returns the complete state as tensors, for saving."""
        return {"counts": self.counts, "exponent": self.exponent, "start": self.start}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Histogram:
        """Returns the histogram with a state from `state()`."""
        hist = cls(*state["counts"].shape)
        hist.counts, hist.exponent, hist.start = state["counts"], state["exponent"], state["start"]
        return hist
