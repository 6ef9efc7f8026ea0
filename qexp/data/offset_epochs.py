"""A loader that goes on where an earlier training ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class OffsetEpochs:
    """A loader whose epochs are numbered on from those of the parts before, so that none of them is seen twice."""

    batch_sampler = None

    def __init__(self, loader: Any, before: int) -> None:
        self.loader, self.before = loader, before

    @property
    def sampler(self) -> OffsetEpochs:
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        for counter in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(counter, "set_epoch"):
                counter.set_epoch(epoch + self.before)
                return

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)
