"""The abstract class that every data set extends."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from torch import Tensor

from qexp.errors import QexpError

log = logging.getLogger(__name__)


class DataSet(LightningDataModule, ABC):
    """Images in three disjoint parts: training, calibration (which also validates) and test.

    Ranges are found on the calibration part and the `best` checkpoint is chosen on it; nothing is trained on it, and nothing is fitted to
    the test part. A batch of a loader is `(images [N, C, H, W], targets)`; data set and task agree on the form of targets.

    Attributes:
        class_names: Names of the classes; empty without classes.
        max_samples: Number of test samples; None is all.
        calibration_size: Number of images asked for as the calibration part.
    """

    class_names: tuple[str, ...] = ()
    max_samples: int | None = None
    calibration_size: int = 0

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the images once, for all stages."""

    @abstractmethod
    def train_dataloader(self) -> Iterable[tuple[Tensor, Any]]:
        """Returns the training part, augmented, in an order that follows from the seed and the epoch."""

    @abstractmethod
    def val_dataloader(self) -> Iterable[tuple[Tensor, Any]]:
        """Returns the calibration part, unaugmented."""

    @abstractmethod
    def test_dataloader(self) -> Iterable[tuple[Tensor, Any]]:
        """Returns the test part in its order, or `max_samples` of it."""

    @abstractmethod
    def calibration_batches(self, n: int, batch_size: int, seed: int) -> list[Tensor]:
        """Returns `n` images of the calibration part as the network sees them, in batches `[B, C, H, W]`; fewer where there are fewer."""

    @abstractmethod
    def example(self) -> Tensor:
        """Returns one input as the network sees it, `[1, C, H, W]`."""

    @property
    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of images: mean, std, max_value, size, channel order."""

    @abstractmethod
    def content_hash(self) -> str:
        """Returns a hash of images, targets and preprocessing; independent of augmentation, batch sizes and seed."""

    def fingerprint(self) -> str:
        """Returns `content_hash()`, computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self.content_hash()

    def sources(self) -> list[Path]:
        """Returns the files that `setup` read: while they do not change, a finished point is found without reading them.

        A class has to state this itself, since a subclass may read other files; see `known_sources`.
        """
        raise NotImplementedError

    def known_sources(self) -> list[Path] | None:
        """Returns `sources()` of a class that defines it itself; None for others."""
        return self.sources() if "sources" in vars(type(self)) else None

    def notes(self) -> dict[str, Any]:
        """Returns the columns about the images in the results, by name."""
        return {}

    def check_max_samples(self, what: str = "the whole test split") -> None:
        """Raises if `max_samples` leaves nothing to test on."""
        if self.max_samples is not None and self.max_samples < 1:
            raise QexpError(
                f"{type(self).__name__}: max_samples={self.max_samples} is not allowed; use at least 1, or null for {what}"
            )

    def held_out_of(self, there: int, what: str = "training images", least: int = 1, most: int | None = None) -> int:
        """Returns the number of images to hold out for calibration: `calibration_size`, or all that may be where it is larger.

        Args:
            there: Number of images that are drawn from.
            what: What they are, for messages.
            least: Smallest number that may be held out.
            most: Greatest number; None is all.

        Raises:
            QexpError: `calibration_size` is below `least`.
        """
        name, asked, most = type(self).__name__, self.calibration_size, there if most is None else most
        if asked < least:
            raise QexpError(
                f"{name}: dataset.data.calibration_size={asked} is not allowed; hold out at least {least} of the {there} {what}"
            )
        if asked > most:
            words = "%s: dataset.data.calibration_size=%d, but there are %d %s; %d are held out for calibration"
            log.warning(words, name, asked, there, what, most)
        return min(asked, most)

    def nothing_left(self, there: int) -> QexpError:
        """Returns the error of a training whose images are all held out for calibration."""
        return QexpError(
            f"{type(self).__name__}: dataset.data.calibration_size={self.calibration_size} holds out all {there} training images, so "
            f"that none is left to train on; name a smaller number, dataset.data.calibration_size={(there + 1) // 2}, or give weights=..."
        )

    def check_draw(self, n: int, held_out: int, more: str) -> None:
        """Checks that calibration images can be drawn; logs a warning if fewer are held out than requested.

        Args:
            n: Number of requested images.
            held_out: Images of the calibration part.
            more: The key that sets the number of held-out images, `dataset.data.calibration_size`.

        Raises:
            QexpError: No images are requested, or none are held out.
        """
        name = type(self).__name__
        if n < 1:
            raise QexpError(f"{name}: {n} calibration images asked for; at least 1 is needed")
        if not held_out:
            raise QexpError(f"{name}: {more}=0 leaves no calibration images; only schedule=float runs without")
        if n > held_out:
            log.warning(
                "%s: %d calibration images asked for, %d are held out; using those (raise %s for more)",
                name,
                n,
                held_out,
                more,
            )
