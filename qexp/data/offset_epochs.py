"""A loader that continues the epochs of an earlier training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class OffsetEpochs:
    """A loader whose epoch numbers continue those of earlier parts, so that no epoch is repeated."""

    batch_sampler = None

    def __init__(self, loader: Any, before: int) -> None:
        self.loader, self.before = loader, before

    @property
    def sampler(self) -> OffsetEpochs:
        """Returns itself; Lightning looks here for `set_epoch`."""
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
