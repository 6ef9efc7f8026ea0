"""The summary of a tensor's values: mergeable, and the input of every range rule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from qexp_kernels import tensor_stats
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.granularity import Granularity, PerGroup, PerTensor
from qexp.statistics.density import Density, binned, sampled
from qexp.statistics.histogram import Histogram
from qexp.system import ranks

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
_LOOK = (  # the fields of `qexp_kernels.Stats`, in their order
    "count",
    "zeros",
    "nonfinite",
    "low",
    "high",
    "total",
    "squares",
    "cubes",
    "fourths",
    "absolute",
    "positive",
    "positive_total",
    "positive_squares",
)
_LOW, _HIGH = _LOOK.index("low"), _LOOK.index("high")
_BATCHES = ("batch_min", "batch_max", "sample_min", "sample_max")
EXACT_VALUES = 2**22  # a whole tensor up to this size is summarised exactly, by its own values


def look(x: Tensor, granularity: Granularity) -> Tensor:
    """Returns the statistics named in `_LOOK` by sample and group, `[13, S, G]` float64 on the CPU, from one pass over `x`.

    The first dimension of `x` is the sample, except for a weight: a weight is one sample, and its first dimension is the group.
    """
    axis = granularity.axis
    if x.ndim < 2 or axis == 0 or isinstance(granularity, PerGroup):
        rows, samples = granularity.rows(x), 1
    elif axis is None:
        rows, samples = x.flatten(1), len(x)
    else:
        rows, samples = x.movedim(axis, 1).reshape(len(x) * x.shape[axis], -1), len(x)
    seen = torch.stack(tensor_stats(rows, axis=0)[: len(_LOOK)]).cpu()
    return seen.reshape(len(_LOOK), samples, -1)


def together(seen: Tensor, dim: int) -> Tensor:
    """Returns the result of `look` merged over its samples (`dim` 1) or its groups (`dim` 2)."""
    out = seen.sum(dim, keepdim=True)
    out[_LOW], out[_HIGH] = seen[_LOW].amin(dim - 1, keepdim=True), seen[_HIGH].amax(dim - 1, keepdim=True)
    return out


class NonFinite(QexpError):
    """A tensor holds NaN or infinity, so that it has no statistics."""


class TensorStats:
    """Counts, extremes, moments and a histogram of all values added so far, for each of the G groups of a granularity.

    All fields are float64 `[G]`; `batch_min`, `batch_max` and the means over a batch of each sample's extremes (`sample_min`,
    `sample_max`) are `[batches, G]`. `b` is the mean absolute deviation of each value from the mean of its batch.
    Two merged summaries equal the summary of a single pass (`b` up to the drift of batch means).

    Args:
        granularity: Granularity that divides the tensor into groups.
        bins: Histogram bins per group; 0 keeps no histogram.

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
        self.extra: dict[str, Tensor] = {}  # values of the collectors of this tensor, by name
        self._values: Tensor | None = None  # [G, n]: the tensor itself, if it is small and came as a whole
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
        x = x.detach().float()
        if x.numel():
            self.add(look(x, self.granularity), self.granularity.rows(x), 0, tuple(x.shape))

    def add(self, looked: Tensor, x: Tensor, axis: int, shape: tuple[int, ...]) -> None:
        """Adds a batch and its `look`; a second pass over the batch finds the mean deviation and fills the histogram.

        Args:
            looked: Result of `look`.
            x: The batch, in any view that has the groups along `axis`.
            axis: Axis of the groups; any axis where there is one group.
            shape: Shape of the batch in the network.
        """
        self._found.clear()
        samples = {"sample_min": looked[_LOW].mean(0), "sample_max": looked[_HIGH].mean(0)}
        seen = dict(zip(_LOOK, together(looked, 1)[:, 0]))
        if bad := int(seen["nonfinite"].sum()):
            raise NonFinite(f"{bad} of {x.numel()} values are NaN or infinite")
        groups = len(seen["count"])
        if self.empty:
            self.shape = shape
            self.histogram = Histogram(groups, self.bins) if self.bins else None
        bins = self.histogram.room_for(seen["low"], seen["high"], x.device) if self.histogram is not None else {}
        mean = (seen["total"] / seen["count"]).float().to(x.device)
        again = tensor_stats(x, axis=axis if groups > 1 else None, center=mean, powers=False, **bins)
        seen["deviation"] = again.sum_deviation.cpu()
        if self.histogram is not None:
            self.histogram.counts += again.histogram.cpu()
        extremes = {"batch_min": seen["low"], "batch_max": seen["high"], **samples}
        for name in _SUMS:
            setattr(self, name, seen[name] + getattr(self, name, 0))
        for name in _BATCHES:
            before = [getattr(self, name)] if hasattr(self, name) else []
            setattr(self, name, torch.cat([*before, extremes[name][None]]))

    def merge(self, other: TensorStats) -> None:
        """Adds the values of another summary of the same site."""
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
        """Returns the histogram; computes it where the summary holds the values themselves."""
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
        """Returns `find()`, cached by key until values are added, so that the points of a sweep share their searches."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    @property
    def density(self) -> Density:
        """The distribution, for searches and order statistics: exact where the values are held, else from the histogram."""
        if self._values is not None:
            return sampled(self._values)
        if self.histogram is None:
            raise QexpError(
                f"a range rule needs a histogram per {self.granularity}, which calibration did not collect; "
                "declare `needs_histogram = True` on the rule"
            )
        return binned(self.histogram, self.zeros, self.min, self.max)

    @property
    def features(self) -> int:
        """Number of elements per sample (for a weight: per group)."""
        return int(math.prod(self.shape[1:])) if len(self.shape) > 1 else int(math.prod(self.shape))

    # -- saving and merging --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Returns the state, without the granularity, as plain tensors."""
        if self.empty:
            return {}
        out = {name: getattr(self, name) for name in _SUMS + _BATCHES}
        out["shape"] = torch.tensor(self.shape, dtype=torch.int64)
        if self.histogram is not None:
            out |= {f"histogram.{k}": v for k, v in self.histogram.state().items()}
        return out

    @classmethod
    def from_state(cls, state: dict[str, Tensor], granularity: Granularity) -> TensorStats:
        """Returns the summary with a state from `state()`."""
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
        """Merges the summaries of all ranks, in rank order; does nothing where the run is not distributed."""
        if ranks.world() == 1:
            return
        merged = TensorStats(self.granularity, self.bins)
        for state in ranks.gathered(self.state()):
            merged.merge(TensorStats.from_state(state, self.granularity))
        self.__dict__.update(merged.__dict__)
