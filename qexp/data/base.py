"""The base class of image data sets: three disjoint parts, a class-balanced calibration draw, a content hash."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.data.balance import balanced
from qexp.data.contract import DataSet
from qexp.data.tensors import Augment, Normalize, TensorLoader
from qexp.errors import QexpError

log = logging.getLogger(__name__)


class Arrays(NamedTuple):
    """The training and the test split: images uint8 [N, C, H, W], labels int64 [N].

    Targets of another kind (maps, clean images, numbers: any tensor of N rows) are kept beside the labels, which balance the draws.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train_targets: Tensor | None = None
    test_targets: Tensor | None = None

    def targets(self, split: str) -> Tensor:
        """Returns the targets of a split's batches, or its labels if it has no targets."""
        own = self.train_targets if split == "train" else self.test_targets
        return own if own is not None else self.train_labels if split == "train" else self.test_labels


class ImageData(DataSet):
    """A labelled image set in memory, with its training split divided into train and calibration.

    The calibration part is a seeded class-balanced draw from the training split. Ranges are found on it and the `best`
    checkpoint is chosen on it; it is never trained on, and nothing is ever fitted to the test split.
    A data set implements `read` and the class attributes.

    Args:
        batch_size: Training batch.
        eval_batch_size: Validation and test batch.
        mean: Mean of each channel, of images divided by `max_value`.
        std: Standard deviation of each channel, likewise.
        augment: `{padding: pixels, flip: true|false}` of the training part; `null` for none.
        calibration_size: Images held out of the training split.
        max_samples: Number of test images; null is all.
        sampling: Which test images: the `first`, or a class-`balanced` draw (the same for every seed).
        seed: Seed of the calibration draw, of order and augmentation.
        size: Side of the network's input; images of another size are resized.
        drop_last: Drop a last training batch that is not full.
        channels_last: Memory format of the batches.
        max_value: Divisor of pixel values before mean and std; null for the set's own (255). Use 1 for a checkpoint that
            subtracts its mean from 0..255.
        channel_order: Channel order of the checkpoint and of mean and std, `rgb` or `bgr`.
    """

    num_classes: int
    class_names: tuple[str, ...]
    max_value: float = 255.0

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Mapping[str, Any] | None = None,
        calibration_size: int = 1000,
        max_samples: int | None = None,
        sampling: str = "first",
        seed: int = 0,
        size: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        max_value: float | None = None,
        channel_order: str = "rgb",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        scale = float(self.max_value if max_value is None else max_value)
        self.normalize = Normalize(tuple(map(float, mean)), tuple(map(float, std)), scale, size, channel_order)
        if any(s <= 0 for s in self.normalize.std):
            raise QexpError(f"{name}: std={list(std)}; every channel's must be above 0")
        if sampling not in ("first", "balanced"):
            raise QexpError(f"{name}: sampling={sampling!r} is not allowed; use first or balanced")
        try:
            self.augment = Augment(**augment) if augment else None
        except TypeError:
            raise QexpError(f"{name}: augment={dict(augment)} is not allowed; use the keys padding and flip") from None
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.calibration_size, self.max_samples, self.seed = calibration_size, max_samples, seed
        self.check_max_samples()
        self.sampling, self.drop_last, self.channels_last = sampling, drop_last, channels_last

    def read(self) -> Arrays:
        """The two splits, from memory or disk."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the images once, for all stages."""
        self.calibration_part  # noqa: B018 - a cached property

    @cached_property
    def arrays(self) -> Arrays:
        """The images and labels, checked; read at first use."""
        arrays = self.read()
        for split in ("train", "test"):
            images, labels = arrays[:2] if split == "train" else arrays[2:4]
            check_split(type(self).__name__, split, images, labels, self.num_classes)
            if len(arrays.targets(split)) != len(images):
                raise QexpError(
                    f"{type(self).__name__}: {len(arrays.targets(split))} {split} targets for {len(images)} images; one for each is needed"
                )
        if arrays.train_targets is not None and self.augment is not None:
            raise QexpError(
                f"{type(self).__name__}: dataset.data.augment is not allowed, since it would move images and not their targets; use null"
            )
        channels = arrays.train_images.shape[1]
        if len(self.normalize.mean) != channels or len(self.normalize.std) != channels:
            raise QexpError(
                f"{type(self).__name__}: the images have {channels} channels, but mean has {len(self.normalize.mean)} "
                f"entries and std {len(self.normalize.std)}; give one for each channel"
            )
        return arrays

    @cached_property
    def calibration_part(self) -> Tensor:
        """Positions in the training split that are held out for calibration and validation, classes alternating."""
        labels = self.arrays.train_labels
        return balanced(labels, self.held_out_of(len(labels)), self.seed)

    @cached_property
    def train_part(self) -> Tensor:
        """Positions of the training images in the training split, ascending."""
        keep = torch.ones(len(self.arrays.train_labels), dtype=torch.bool)
        keep[self.calibration_part] = False
        return keep.nonzero().flatten()

    def train_dataloader(self) -> TensorLoader:
        if not len(self.train_part):
            raise self.nothing_left(len(self.arrays.train_labels))
        return TensorLoader(
            self.arrays.train_images,
            self.arrays.targets("train"),
            self.batch_size,
            self.normalize,
            indices=self.train_part,
            augment=self.augment,
            shuffle=True,
            seed=self.seed,
            drop_last=self.drop_last,
            channels_last=self.channels_last,
        )

    def val_dataloader(self) -> TensorLoader:
        """The calibration part, unaugmented."""
        return self._evaluate(self.arrays.train_images, self.arrays.targets("train"), self.calibration_part)

    def test_dataloader(self) -> TensorLoader:
        """The test split in its order, or `max_samples` of it."""
        return self._evaluate(self.arrays.test_images, self.arrays.targets("test"), self.test_part)

    @property
    def test_candidates(self) -> Tensor:
        """Positions in the test split that may be tested on, ascending."""
        return torch.arange(len(self.arrays.test_labels))

    @cached_property
    def test_part(self) -> Tensor:
        """Positions in the test split that are tested on, ascending."""
        part = self.test_candidates
        if self.max_samples is None or self.max_samples >= len(part):
            return part
        if self.sampling == "first":
            return part[: self.max_samples]
        return part[balanced(self.arrays.test_labels[part], self.max_samples, seed=0)].sort().values

    def _evaluate(self, images: Tensor, labels: Tensor, indices: Tensor) -> TensorLoader:
        size = self.eval_batch_size
        return TensorLoader(images, labels, size, self.normalize, indices=indices, channels_last=self.channels_last)

    def calibration_indices(self, n: int, seed: int) -> list[int]:
        """Positions in the training split of a class-balanced draw of `n` images from the calibration part.

        If there are fewer, it logs a warning and returns them all: the length of the list is the number used.
        """
        part = self.calibration_part
        self.check_draw(n, len(part), "dataset.data.calibration_size")
        return part[balanced(self.arrays.train_labels[part], n, seed)].tolist()

    def calibration_batches(self, n: int, batch_size: int, seed: int) -> list[Tensor]:
        """The images of `calibration_indices(n, seed)` as the network sees them, in batches [B, C, H, W]."""
        loader = TensorLoader(
            self.arrays.train_images,
            self.arrays.train_labels,
            batch_size,
            self.normalize,
            indices=self.calibration_indices(n, seed),
            channels_last=self.channels_last,
        )
        return [images for images, _ in loader]

    def example(self) -> Tensor:
        """One input as the network sees it, [1, C, H, W]: the first training image."""
        return self.normalize(self.arrays.train_images[:1])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of images: mean, std, max_value, size, channel order, and the training augmentation."""
        return {**asdict(self.normalize), "augment": asdict(self.augment) if self.augment else None}

    def notes(self) -> dict[str, Any]:
        """Columns about the images in the results, by name."""
        return {"calibration_from": f"{len(self.calibration_part)} images of the training side, seed {self.seed}"}

    def content_hash(self) -> str:
        """Returns a hash of images, labels and normalisation."""
        digest = hashlib.sha256(json.dumps(self.normalize.identity()).encode())
        for name, array in self.arrays._asdict().items():
            if array is None:
                continue
            digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
            digest.update(array.contiguous().numpy())
        return digest.hexdigest()


def check_split(where: str, split: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raises if a split is not uint8 images [N, C, H, W] with one integer label in 0..num_classes-1 each."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        got = f"{images.dtype} {list(images.shape)}"
        raise QexpError(f"{where}: {split} images are {got}; uint8 [N, C, H, W] with N > 0 is needed")
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise QexpError(
            f"{where}: {split} labels are {labels.dtype} {list(labels.shape)}; integers [{len(images)}] are needed"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise QexpError(f"{where}: {split} labels span {low}..{high}; allowed: 0..{num_classes - 1}")
