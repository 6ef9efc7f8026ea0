"""What was seen of a tensor: one mergeable summary, from which every range rule works."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from qexp.calibration.density import Density, binned, sampled
from qexp.calibration.histogram import Histogram
from qexp.errors import QexpError
from qexp.numerics.granularity import Granularity, PerGroup, PerTensor

_SUMS = (
    "count",
    "zeros",
    "total",
    "squares",
    "cubes",
    "fourths",
    "absolute",
    "deviation",
    "positive",
    "positive_total",
    "positive_squares",
)
_BATCHES = ("batch_min", "batch_max", "sample_min", "sample_max")
EXACT_VALUES = 2**22  # a tensor at hand up to this size is summarised by its own values, exactly


def sums(x: Tensor, dims: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns counts, extremes and power sums of float32 `x` over `dims`, the sums as float64."""
    square, positive = x * x, x.clamp_min(0)
    out = {
        "zeros": (x == 0).sum(dims),
        "total": x.sum(dims),
        "squares": square.sum(dims),
        "cubes": (square * x).sum(dims),
        "fourths": (square * square).sum(dims),
        "absolute": x.abs().sum(dims),
        "positive": (x > 0).sum(dims),
        "positive_total": positive.sum(dims),
        "positive_squares": (positive * positive).sum(dims),
        "low": x.amin(dims),
        "high": x.amax(dims),
    }
    out = {name: value.double() for name, value in out.items()}
    return out | {"count": torch.full_like(out["total"], x.numel() / max(out["total"].numel(), 1))}


def together(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the sums of the whole tensor, `[1]`, from those of its channels."""
    out = {name: value.sum(0, keepdim=True) for name, value in seen.items()}
    return out | {"low": seen["low"].amin(0, keepdim=True), "high": seen["high"].amax(0, keepdim=True)}


def sample_extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Returns the means over the batch of each sample's least and greatest value, `[G]` (a weight is one sample)."""
    axis = granularity.axis
    if x.ndim < 2 or axis == 0 or isinstance(granularity, PerGroup):
        rows = granularity.rows(x)
        return rows.amin(1), rows.amax(1)
    if axis is None:
        flat = x.flatten(1)
        return flat.amin(1).mean(0, keepdim=True), flat.amax(1).mean(0, keepdim=True)
    flat = x.movedim(axis, 1)
    flat = flat.flatten(2) if x.ndim > 2 else flat[:, :, None]
    return flat.amin(2).mean(0), flat.amax(2).mean(0)


class NonFinite(QexpError):
    """A tensor held NaN or infinity where a statistic was to be taken."""


class TensorStats:
    """Counts, extremes, moments and a histogram of everything seen, for each of the G groups of a granularity.

    All fields are float64 `[G]`; `batch_min`, `batch_max` and the means over a batch of each sample's extremes (`sample_min`,
    `sample_max`) are `[batches, G]`. `b` is the mean absolute deviation from the mean of the batch a value came in.
    Two summaries merge into the one that a single pass would have given (`b` up to the drift of batch means).

    Args:
        granularity: How the tensor falls into groups.
        bins: Histogram bins a group; 0 keeps no histogram.

    >>> stats = TensorStats(bins=64)
    >>> stats.update(torch.tensor([[0.0, 1.0], [2.0, -1.0]]))
    >>> stats.min.item(), stats.max.item(), stats.zeros.item(), stats.mean.item()
    (-1.0, 2.0, 1.0, 0.5)
    """

    def __init__(self, granularity: Granularity | None = None, bins: int = 8192) -> None:
        self.granularity = granularity or PerTensor()
        self.bins = bins
        self.histogram: Histogram | None = None
        self.shape: tuple[int, ...] = ()
        self.extra: dict[str, Tensor] = {}  # what collectors hold of the same tensor, by their names
        self._values: Tensor | None = None  # [G, n]: the tensor itself, where it was at hand and small
        self._found: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, x: Tensor, granularity: Granularity | None = None, bins: int = 2048) -> TensorStats:
        """Returns the summary of one whole tensor (a weight); exact where it has at most `EXACT_VALUES` elements."""
        exact = x.numel() <= EXACT_VALUES
        stats = cls(granularity, 0 if exact else bins)
        stats.update(x)
        if exact:
            stats._values = stats.granularity.rows(x.detach()).double().cpu()
        return stats

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds a batch; raises `NonFinite` if it holds NaN or infinity."""
        x = x.detach()
        if x.numel():
            rows = self.granularity.rows(x).float()
            self.add(sums(rows, (1,)), rows, sample_extremes(x, self.granularity), tuple(x.shape))

    def add(
        self, seen: dict[str, Tensor], rows: Tensor, samples: tuple[Tensor, Tensor], shape: tuple[int, ...]
    ) -> None:
        """Adds a batch whose sums were taken already: `rows` is any view of it as `[G, ...]`."""
        self._found.clear()
        if not bool(torch.isfinite(seen["low"] + seen["high"] + seen["total"]).all()):
            bad = int((~torch.isfinite(rows)).sum())
            if bad:
                raise NonFinite(f"{bad} of {rows.numel()} values are NaN or infinite")
        flat = rows.flatten(1)
        mean = (seen["total"] / seen["count"]).to(flat.dtype)
        seen = seen | {"deviation": (flat - mean[:, None]).abs().sum(1).double()}
        extremes = {
            "batch_min": seen["low"],
            "batch_max": seen["high"],
            "sample_min": samples[0],
            "sample_max": samples[1],
        }
        extremes = {name: value.double().cpu()[None] for name, value in extremes.items()}
        if self.empty:
            self.shape = shape
            self.histogram = Histogram(len(rows), self.bins) if self.bins else None
            self.__dict__.update({name: seen[name].cpu() for name in _SUMS} | extremes)
        else:
            for name in _SUMS:
                setattr(self, name, getattr(self, name) + seen[name].cpu())
            for name in _BATCHES:
                setattr(self, name, torch.cat([getattr(self, name), extremes[name]]))
        if self.histogram is not None:
            self.histogram.update(flat, seen["low"], seen["high"])

    def merge(self, other: TensorStats) -> None:
        """Adds what another summary of the same site has seen."""
        if not other.shape:
            return
        self._found = {}
        if not self.shape:
            self.__dict__.update(copy.deepcopy(other.__dict__ | {"_found": {}}))
            return
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _BATCHES:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        if self._values is not None and other._values is not None:
            self._values = torch.cat([self._values, other._values], dim=1)
            return
        bins = self.bins or other.bins
        mine, theirs = self._counted(bins), other._counted(bins)
        if mine is not None and theirs is not None:
            mine.merge(theirs)
        self.histogram, self.bins, self._values = mine, bins, None

    def _counted(self, bins: int) -> Histogram | None:
        """Returns the histogram, made of the values where those are at hand instead."""
        if self.histogram is not None or self._values is None or not bins:
            return self.histogram
        histogram = Histogram(len(self._values), bins)
        histogram.update(self._values.float(), self.min, self.max)
        return histogram

    # -- what rules read -----------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        return not self.shape

    @property
    def min(self) -> Tensor:
        return self.batch_min.amin(0)

    @property
    def max(self) -> Tensor:
        return self.batch_max.amax(0)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation."""
        variance = (self.squares - self.total * self.mean) / (self.count - 1).clamp_min(1)
        return variance.clamp_min(0).sqrt()

    @property
    def mean_abs(self) -> Tensor:
        return self.absolute / self.count

    @property
    def b(self) -> Tensor:
        """Mean absolute deviation `E|x - E x|`, the scale of a Laplace distribution."""
        return self.deviation / self.count

    @property
    def kurtosis(self) -> Tensor:
        """Excess kurtosis (0 for a normal distribution)."""
        m, n = self.mean, self.count
        second = self.squares / n - m**2
        fourth = self.fourths / n - 4 * m * self.cubes / n + 6 * m**2 * self.squares / n - 3 * m**4
        return fourth / second.square().clamp_min(1e-300) - 3

    def remember(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Returns `find()`, which is called once for a key as long as nothing more is seen: points of a sweep share their searches."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    @property
    def density(self) -> Density:
        """How the values lie, for searches and order statistics: exact where the tensor is at hand, else from the histogram."""
        if self._values is not None:
            return sampled(self._values)
        if self.histogram is None:
            raise QexpError(
                f"a range rule asked for a histogram per {self.granularity}, which calibration did not collect; "
                "declare `needs_histogram = True` on the rule"
            )
        return binned(self.histogram, self.zeros, self.min, self.max)

    @property
    def features(self) -> int:
        """Elements of one sample (for a weight: of one group)."""
        return int(math.prod(self.shape[1:])) if len(self.shape) > 1 else int(math.prod(self.shape))

    # -- keeping -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Returns plain tensors that hold everything but the granularity."""
        if self.empty:
            return {}
        out = {name: getattr(self, name) for name in _SUMS + _BATCHES}
        out["shape"] = torch.tensor(self.shape, dtype=torch.int64)
        if self.histogram is not None:
            out |= {f"histogram.{k}": v for k, v in self.histogram.state().items()}
        return out

    @classmethod
    def from_state(cls, state: dict[str, Tensor], granularity: Granularity) -> TensorStats:
        """Returns the summary that `state()` described."""
        stats = cls(granularity, 0)
        if not state:
            return stats
        for name in _SUMS + _BATCHES:
            setattr(stats, name, state[name])
        stats.shape = tuple(int(n) for n in state["shape"])
        if "histogram.counts" in state:
            stats.histogram = Histogram.from_state(
                {k.removeprefix("histogram."): v for k, v in state.items() if k.startswith("histogram.")}
            )
            stats.bins = stats.histogram.bins
        return stats

    def sync(self) -> None:
        """Merges the summaries of all ranks of a distributed run, in rank order; without one, does nothing."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, self.state())
        merged = TensorStats(self.granularity, self.bins)
        for state in gathered:
            merged.merge(TensorStats.from_state(state, self.granularity))
        self.__dict__.update(merged.__dict__)
