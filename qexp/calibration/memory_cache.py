"""Statistics that the points of a sweep share in memory: of weights by content, of activations by the file they are stored in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from qexp.calibration.cache import load_stats, tensor_hash
from qexp.calibration.site_stats import Calibration
from qexp.numerics.granularity import Granularity
from qexp.statistics.stats import TensorStats

Value = TypeVar("Value")
_ELEMENTS = 2**23  # largest total size of weights with statistics in memory: 64 MiB of values
_BYTES = 2**28  # largest total size of files with statistics in memory


class Kept(Generic[Value]):
    """Holds the values used most recently, up to a total size; drops the least recently used first.

    Args:
        capacity: Sum of the sizes that may be held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held = capacity, 0
        self._values: OrderedDict[Hashable, tuple[int, Value]] = OrderedDict()

    def get(self, key: Hashable, size: int, make: Callable[[], Value]) -> Value:
        """Returns the value of a key; makes it where it is not held."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key][1]
        value = make()
        if size <= self.capacity:
            self._values[key] = (size, value)
            self.held += size
            while self.held > self.capacity:
                self.held -= self._values.popitem(last=False)[1][0]
        return value

    def clear(self) -> None:
        """Drops all values."""
        self._values.clear()
        self.held = 0


_weights: Kept[TensorStats] = Kept(_ELEMENTS)
_calibrations: Kept[Calibration | None] = Kept(_BYTES)


def weight_stats(
    weight: Tensor, granularity: Granularity | None = None, exact: bool = True, bins: int = 2048
) -> TensorStats:
    """Returns the summary of a weight, the same object for equal content; `exact` as in `TensorStats.of`, else by histogram."""

    def make() -> TensorStats:
        if exact:
            return TensorStats.of(weight, granularity, bins)
        stats = TensorStats(granularity, bins)
        stats.update(weight)
        return stats

    return _weights.get((tensor_hash([weight]), granularity, exact, bins), weight.numel(), make)


def kept_stats(path: Path) -> Calibration | None:
    """Returns the statistics stored at `path`; reads an unchanged file only once. None where it is missing or damaged."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return _calibrations.get(
        (path.absolute(), seen.st_mtime_ns, seen.st_size, seen.st_ino), seen.st_size, lambda: load_stats(path)
    )


def forget() -> None:
    """Drops all statistics that are shared in memory."""
    _weights.clear()
    _calibrations.clear()
