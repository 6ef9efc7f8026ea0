"""The distribution of values, one row per group: order statistics and the expected error of any quantizer.

Both forms use cumulative sums of `1`, `x` and `x^2`. One form sorts the values themselves (exact). The other uses the bins of a
histogram, assumed evenly filled, with the exact zeros as a separate point. The squared error of a quantizer is then a sum over its
levels, not over the values, so that a search over a hundred ranges costs as much as one pass over the tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from qexp.statistics.histogram import Histogram


class Density(ABC):
    """The distribution of G groups of values; all results are float64 with leading dimension G."""

    count: Tensor  # [G]

    @abstractmethod
    def moments_below(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the count, the sum and the sum of squares of the values below `t` `[G, K]`."""

    @abstractmethod
    def order(self, rank: Tensor) -> Tensor:
        """Returns the value at ascending `rank` `[G]` (0 = the least)."""

    @abstractmethod
    def points(self) -> tuple[Tensor, Tensor]:
        """Returns values and their weights, both `[G, K]`, that represent the distribution."""

    @abstractmethod
    def counts(self, group: int, low: float, high: float, bins: int, magnitudes: bool = False) -> np.ndarray:
        """Returns the number of values of one group in each of `bins` equal bins of `[low, high]`, float64 `[bins]`.

        With `magnitudes`, counts the nonzero `|x|`; `low` must not be negative then.
        """

    def absolute_order(self, rank: Tensor) -> Tensor:
        """Returns the value of `|x|` at descending `rank` `[G]` (0 = the greatest)."""
        values, weights = self.points()
        magnitude, index = values.abs().sort(dim=1, descending=True)
        reached = weights.gather(1, index).cumsum(1) > rank[:, None] + 1e-9
        return magnitude.gather(1, reached.int().argmax(1, keepdim=True)).squeeze(1)

    def squared_error(self, levels: Tensor) -> Tensor:
        """Returns the summed squared error of rounding every value to the nearest of `levels` (ascending): `[G, K]` -> `[G]`.

        Several sets of levels at once, `[G, N, K]`, give `[G, N]`.
        """
        inner = (levels[..., 1:] + levels[..., :-1]) / 2
        below = (m.reshape(inner.shape) for m in self.moments_below(inner.flatten(1)))
        n, s1, s2 = (_between(m, total) for m, total in zip(below, self._totals()))
        return (s2 - 2 * levels * s1 + levels**2 * n).sum(-1).clamp_min(0)

    def lp_error(self, quantized: Tensor, p: float) -> Tensor:
        """Returns `sum |x - quantized|^p` `[G]`; `quantized` holds the quantized values of `points()`."""
        values, weights = self.points()
        return ((values - quantized).abs().pow(p) * weights).sum(1)

    @abstractmethod
    def _totals(self) -> tuple[Tensor, Tensor, Tensor]: ...


def _between(below: Tensor, total: Tensor) -> Tensor:
    """Returns the differences of cumulative values between consecutive thresholds: `[G, ..., K-1]` -> `[G, ..., K]`."""
    total = total.reshape(-1, *(1,) * (below.ndim - 1)).expand(*below.shape[:-1], 1)
    return torch.diff(torch.cat([torch.zeros_like(total), below, total], dim=-1), dim=-1)


class _Sampled(Density):
    def __init__(self, values: Tensor) -> None:
        self.values = values.double().sort(dim=1).values
        self.count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
        start = torch.zeros(len(values), 1, dtype=torch.float64)
        self.first = torch.cat([start, self.values.cumsum(1)], dim=1)
        self.second = torch.cat([start, self.values.square().cumsum(1)], dim=1)

    def moments_below(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.searchsorted(self.values, t.contiguous())
        return index.double(), self.first.gather(1, index), self.second.gather(1, index)

    def order(self, rank: Tensor) -> Tensor:
        index = rank.long().clamp(0, self.values.shape[1] - 1)
        return self.values.gather(1, index[:, None]).squeeze(1)

    def points(self) -> tuple[Tensor, Tensor]:
        return self.values, torch.ones_like(self.values)

    def counts(self, group: int, low: float, high: float, bins: int, magnitudes: bool = False) -> np.ndarray:
        x = self.values[group].numpy()
        x = np.abs(x[x != 0]) if magnitudes else x
        return np.histogram(x, bins=bins, range=(low, high))[0].astype(np.float64)

    def _totals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count, self.first[:, -1], self.second[:, -1]


class _Binned(Density):
    def __init__(self, histogram: Histogram, zeros: Tensor, low: Tensor, high: Tensor) -> None:
        self.start, self.width = histogram.low, histogram.width.clamp_min(1e-300)
        self.n, self.zeros = histogram.counts.double(), zeros
        self.least, self.greatest = low, high
        self.count = self.n.sum(1) + zeros
        edge = self.start[:, None] + self.width[:, None] * torch.arange(histogram.bins, dtype=torch.float64)
        self.edge, w = edge, self.width[:, None]
        start = torch.zeros(len(self.n), 1, dtype=torch.float64)
        self.c0 = torch.cat([start, self.n.cumsum(1)], dim=1)
        self.c1 = torch.cat([start, (self.n * (edge + w / 2)).cumsum(1)], dim=1)
        self.c2 = torch.cat([start, (self.n * (edge**2 + edge * w + w**2 / 3)).cumsum(1)], dim=1)

    def moments_below(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = self.width[:, None]
        position = ((t - self.start[:, None]) / w).clamp(0, self.n.shape[1])
        k = position.floor().clamp_max(self.n.shape[1] - 1).long()
        part = (position - k) * w
        a, share = self.edge.gather(1, k), self.n.gather(1, k) * (position - k)
        below = self.c0.gather(1, k) + share + torch.where(t > 0, self.zeros[:, None], 0.0)
        first = self.c1.gather(1, k) + share * (a + part / 2)
        second = self.c2.gather(1, k) + share * (a**2 + a * part + part**2 / 3)
        return below, first, second

    def order(self, rank: Tensor) -> Tensor:
        values, weights = self.points()
        reached = weights.cumsum(1) > rank[:, None] + 1e-9
        found = values.gather(1, reached.int().argmax(1, keepdim=True)).squeeze(1)
        found = torch.where(rank >= self.count - 1, self.greatest, found)
        return torch.where(rank <= 0, self.least, found)

    def points(self) -> tuple[Tensor, Tensor]:
        values = self.edge + self.width[:, None] / 2
        values = torch.maximum(torch.minimum(values, self.greatest[:, None]), self.least[:, None])
        values = torch.cat([values, torch.zeros_like(self.zeros)[:, None]], dim=1)
        weights = torch.cat([self.n, self.zeros[:, None]], dim=1)
        values, index = values.sort(dim=1)
        return values, weights.gather(1, index)

    def counts(self, group: int, low: float, high: float, bins: int, magnitudes: bool = False) -> np.ndarray:
        own = torch.cat([self.edge[group], self.edge[group, -1:] + self.width[group]])
        own = own.clamp(self.least[group], self.greatest[group]).numpy()  # the outer bins are empty beyond the extremes
        edges = np.linspace(low, high, bins + 1)

        def per_bin(edges: np.ndarray) -> np.ndarray:
            # counts must be whole: a bin of a sparse tail holds one value or none
            return np.diff(np.rint(np.interp(edges, own, self.c0[group].numpy())))

        counts = per_bin(edges)
        if magnitudes:
            return counts + per_bin(-edges[::-1])[::-1]
        if low <= 0 <= high:
            counts[min(int(np.searchsorted(edges, 0.0, "right")), bins) - 1] += float(self.zeros[group])
        return counts

    def absolute_order(self, rank: Tensor) -> Tensor:
        found = super().absolute_order(rank)
        return torch.where(rank <= 0, torch.maximum(self.least.abs(), self.greatest.abs()), found)

    def _totals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count, self.c1[:, -1], self.c2[:, -1]


def sampled(values: Tensor) -> Density:
    """Returns the exact density of `values` `[G, n]`."""
    return _Sampled(values)


def binned(histogram: Histogram, zeros: Tensor, low: Tensor, high: Tensor) -> Density:
    """Returns the density of a histogram, with `zeros` `[G]` exact zeros besides and known extremes `low`, `high` `[G]`."""
    return _Binned(histogram, zeros, low, high)
