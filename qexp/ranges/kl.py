"""The clipping threshold with the least Kullback-Leibler divergence between the histograms before and after quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.base import Context
from qexp.statistics.density import Density
from qexp.statistics.stats import TensorStats

_EPSILON = 1e-4


@dataclass(frozen=True)
class KL:
    """Picks the symmetric range (or `[0, t]` for a tensor without negative values) with the least KL divergence.

    Args:
        variant: `mxnet` searches windows around zero in a histogram over `[-T, T]`, with K = 2^bits - 1 quantized bins. `one_sided`
            searches the histogram of the nonzero `|x|`, with K = 2^(bits-1) bins (see `groups` for a non-negative tensor). `auto` uses
            `one_sided` for a tensor without negative values, because its mass at zero misleads the symmetric search.
        bins: Histogram bins; None means 8001 at 8 bits or more, 2001 below, and 2048 for `one_sided`.
        groups: K of `one_sided` for a tensor without negative values: `levels` is all 2^bits levels of an unsigned grid; `half` is
            2^(bits-1) as for signed codes (128 at 8 bits), as in the paper.

    Source: Migacz 2017 (TensorRT's 8-bit inference); the variant `mxnet` as in cnn-quantization, which never fills the last bin of the
    window.
    Differs from the paper: thresholds come from one histogram of all samples, not from the mean over batches of each batch's maximum;
    calibration's bins are assumed evenly filled where the edges of this histogram cut them. A non-negative tensor has twice the paper's
    K, since its grid has twice the levels (`groups: half` is as in the paper). Computed in float64: near-ties are common (thresholds
    some percent of T apart with divergences that differ by a few thousandths), and float32 would select other thresholds.
    """

    variant: Literal["auto", "mxnet", "one_sided"] = "auto"
    bins: int | None = None
    groups: Literal["levels", "half"] = "levels"

    def __post_init__(self) -> None:
        if self.variant not in ("auto", "mxnet", "one_sided"):
            raise QexpError(f"KL: variant={self.variant!r} is not allowed; use auto, mxnet or one_sided")
        if self.groups not in ("levels", "half"):
            raise QexpError(f"KL: groups={self.groups!r} is not allowed; use levels or half")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        if isinstance(grid.bits, Tensor):
            raise QexpError(
                "KL needs one width for all channels; for bit allocation by channel use aciq, mse or minmax"
            )
        density = stats.density
        limit = torch.maximum(stats.min.abs(), stats.max.abs())
        alpha = torch.stack(
            [
                self._threshold(density, g, float(limit[g]), float(stats.min[g]) >= 0, grid.bits)
                for g in range(len(limit))
            ]
        )
        if context.symmetric:
            return torch.where(stats.min >= 0, 0.0, -alpha), alpha
        return torch.maximum(-alpha, stats.min.clamp_max(0)), alpha  # no levels below the observed minimum

    def _threshold(self, density: Density, group: int, limit: float, positive: bool, bits: int) -> Tensor:
        if limit == 0:
            return torch.zeros((), dtype=torch.float64)
        if self.variant == "one_sided" or (self.variant == "auto" and positive):
            bins = self.bins or 2048
            counts = density.counts(group, 0.0, limit, bins, magnitudes=True)
            index = one_sided_index(counts, 2**bits if positive and self.groups == "levels" else 2 ** (bits - 1))
            return torch.tensor((index + 0.5) * limit / bins, dtype=torch.float64).clamp_max(limit)
        bins = self.bins or (8001 if bits >= 8 else 2001)
        counts = density.counts(group, -limit, limit, bins)
        return torch.tensor(mxnet_threshold(counts, limit, 2**bits - 1), dtype=torch.float64)


def mxnet_threshold(counts: np.ndarray, limit: float, quantized_bins: int) -> float:
    """Returns the right edge of the window with the least divergence in a histogram over `[-limit, limit]`.

    Args:
        counts: Histogram, B bins (odd).
        limit: T, the greatest magnitude.
        quantized_bins: K, 255 at 8 bits, 15 at 4.
    """
    counts = counts.astype(np.float64)
    bins = len(counts)
    if bins % 2 == 0:
        raise QexpError(f"KL: the histogram needs an odd number of bins, got {bins}")
    middle = bins // 2
    best, best_half = np.inf, middle
    before = np.concatenate([[0.0], counts.cumsum()])
    for half in range(quantized_bins // 2, middle + 1):
        first, last = middle - half, middle + half + 1
        own = counts[first:last]
        p = own.copy()
        p[0] += before[first]
        p[-1] += before[-1] - before[last]
        q = _spread(own, quantized_bins)
        p, q = _smooth(p), _smooth(q)
        if p is None or q is None:
            continue
        p, q = p / p.sum(), q / q.sum()
        divergence = float(np.sum(p * np.log(p / q)))
        if divergence < best:
            best, best_half = divergence, half
    return (2 * best_half + 1) * limit / bins


def _spread(own: np.ndarray, quantized_bins: int) -> np.ndarray:
    """Returns the window quantized to K groups and spread back over its non-empty bins; the last bin is not filled (see `KL`)."""
    group = np.minimum(np.arange(len(own)) // (len(own) // quantized_bins), quantized_bins - 1)
    mass = np.bincount(group, weights=own, minlength=quantized_bins)
    counted = own != 0
    counted[-1] = False
    filled = np.bincount(group[counted], minlength=quantized_bins)
    level = np.divide(mass, filled, out=np.zeros_like(mass), where=filled > 0)
    return np.where(counted, level[group], 0.0)


def _smooth(p: np.ndarray) -> np.ndarray | None:
    """Returns `p` with a small mass moved from the positive entries to the zeros; None where the positive entries are too small."""
    zero = p == 0
    if zero.all():
        return None
    p = np.where(zero, _EPSILON, p - _EPSILON * zero.sum() / (~zero).sum())
    return p if (p > 0).all() else None


def one_sided_index(counts: np.ndarray, quantized_bins: int) -> int:
    """Returns the number of bins to keep in a histogram of magnitudes for the least divergence with K quantized bins."""
    counts = counts.astype(np.float64)
    bins = len(counts)
    best, best_index = np.inf, bins
    before = np.concatenate([[0.0], counts.cumsum()])
    for i in range(quantized_bins, bins + 1):
        own = counts[:i]
        if (
            i < bins and np.count_nonzero(own) < 2
        ):  # a single non-empty bin always matches itself, so its divergence has no meaning
            continue
        p = own.copy()
        p[-1] += before[-1] - before[i]
        group = np.arange(i) * quantized_bins // i
        mass = np.bincount(group, weights=own, minlength=quantized_bins)
        filled = np.bincount(group[own != 0], minlength=quantized_bins)
        level = np.divide(mass, filled, out=np.zeros_like(mass), where=filled > 0)
        q = np.where(own != 0, level[group], 0.0)
        if p.sum() == 0 or q.sum() == 0:
            continue
        p, q = p / p.sum(), q / q.sum()
        present = p > 0
        divergence = float(np.sum(p[present] * np.log(p[present] / np.maximum(q[present], 1e-12))))
        if divergence < best:
            best, best_index = divergence, i
    return best_index
