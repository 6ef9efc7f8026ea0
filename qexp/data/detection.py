"""The base class of detection sets: pictures with boxes in three disjoint parts, decoded when needed, and a calibration draw."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from qexp.data.annotations import CORNERS, VOC_CLASSES, Objects
from qexp.data.balance import balanced
from qexp.data.contract import DataSet
from qexp.data.decode import BadImage, rgb
from qexp.data.pictures import Draws, Picture, Pictures, collate
from qexp.data.tensors import Normalize
from qexp.errors import QexpError

log = logging.getLogger(__name__)


class DetectionData(DataSet):
    """Annotated pictures, their training split divided into train and calibration.

    Batches are `(images [B, C, H, W] float, targets)`, a target a dictionary of `boxes` `[n, 4]` (corners in shares of the image),
    `labels`, `difficult`. An image is squashed to `size` (bilinear, antialiased) from any shape. `findings` counts and reports dropped
    and changed boxes and images. A data set implements `read` and `load`.

    Args:
        batch_size: Training batch.
        eval_batch_size: Validation and test batch.
        size: Height and width of the network's input.
        mean: Mean of each channel in the network's order, of images in 0..1 (0..255 with `max_value: 1`).
        std: Standard deviation of each channel, likewise.
        max_value: Divisor of pixel values.
        channel_order: Channel order of the checkpoint, `rgb` or `bgr`.
        augment: Train on random crops, mirrored and with changed colours.
        calibration_size: Images held out of the training split.
        max_samples: Number of test images, taken from the front; null is all.
        seed: Seed of the calibration draw, of order and augmentation.
        corners: `pixels`: annotated corners are the first and the last pixel of a box, counted from 1; `as_given`: coordinates.
        keep: Number of squashed test images that stay in memory after the first evaluation.
        workers: Processes that decode and augment training images.
    """

    class_names: tuple[str, ...] = VOC_CLASSES

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        max_value: float = 255.0,
        channel_order: str = "rgb",
        augment: bool = True,
        calibration_size: int = 256,
        max_samples: int | None = None,
        seed: int = 0,
        corners: str = "pixels",
        keep: int = 2000,
        workers: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if corners not in CORNERS:
            raise QexpError(f"{name}: corners={corners!r} is not allowed; use {' or '.join(CORNERS)}")
        self.normalize = Normalize(
            tuple(map(float, mean)), tuple(map(float, std)), float(max_value), channel_order=channel_order
        )
        self.size, self.corners = (int(size[0]), int(size[1])), corners
        self.batch_size, self.eval_batch_size, self.augment = batch_size, eval_batch_size, augment
        self.calibration_size, self.max_samples, self.seed = calibration_size, max_samples, seed
        self.keep, self.workers = keep, workers
        self.check_max_samples()
        self.tally: Counter[str] = Counter()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, split: str) -> list[Picture]:
        """The pictures of the `train` or `test` split, in order; adds dropped boxes and images to the counts in `tally`."""
        raise NotImplementedError

    def load(self, picture: Picture) -> bytes:
        """A picture's file."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Reads the annotations once, for all stages."""
        self.splits  # noqa: B018 - a cached property

    @cached_property
    def splits(self) -> dict[str, list[Picture]]:
        """The pictures by split; logs once which were dropped or changed."""
        found = {split: self.read(split) for split in ("train", "test")}
        for split, pictures in found.items():
            if not pictures:
                raise QexpError(
                    f"{type(self).__name__}: the {split} split holds no annotated image; check root and files"
                )
        both = {str(p.source) for p in found["train"]} & {str(p.source) for p in found["test"]}
        if both:
            raise QexpError(
                f"{type(self).__name__}: {len(both)} images are in the train and in the test split; test images must not be used "
                "for fitting: choose disjoint lists (trainval and test, or train and val)"
            )
        if self.findings:
            what = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.findings.items())
            log.warning("%s: %s", type(self).__name__, what)
        return found

    @property
    def findings(self) -> dict[str, int]:
        """Counts of boxes and images that were clipped or dropped, or are difficult, by kind."""
        return {name: count for name, count in sorted(self.tally.items()) if count}

    @cached_property
    def calibration_part(self) -> Tensor:
        """Places in the training split held out for calibration and validation: a draw balanced over each picture's largest object."""
        pictures = self.splits["train"]
        size = self.held_out_of(len(pictures))
        return balanced(torch.tensor([_largest(p.objects) for p in pictures]), size, self.seed)

    @cached_property
    def train_part(self) -> Tensor:
        """Places of the training pictures in the training split, ascending."""
        keep = torch.ones(len(self.splits["train"]), dtype=torch.bool)
        keep[self.calibration_part] = False
        return keep.nonzero().flatten()

    def train_dataloader(self) -> DataLoader:
        if not len(self.train_part):
            raise self.nothing_left(len(self.splits["train"]))
        pictures = Pictures(self, "train", augment=self.augment)
        draws = Draws(self.train_part, self.seed)
        return DataLoader(
            pictures, self.batch_size, sampler=draws, collate_fn=collate, num_workers=self.workers, drop_last=False
        )

    def val_dataloader(self) -> DataLoader:
        """The calibration part, unaugmented."""
        return self._evaluate("train", self.calibration_part.tolist())

    def test_dataloader(self) -> DataLoader:
        """The test split in its order, or its first `max_samples`."""
        n = len(self.splits["test"])
        return self._evaluate("test", range(n if self.max_samples is None else min(n, self.max_samples)))

    @cached_property
    def _test(self) -> Pictures:
        return Pictures(self, "test", keep=self.keep)

    def _evaluate(self, split: str, places: Sequence[int]) -> DataLoader:
        pictures = self._test if split == "test" else Pictures(self, split)
        return DataLoader(pictures, self.eval_batch_size, sampler=[(p, None) for p in places], collate_fn=collate)

    def calibration_batches(self, n: int, batch_size: int, seed: int) -> list[Tensor]:
        """At most `n` images of the calibration part as the network sees them, in batches `[B, C, H, W]`."""
        part = self.calibration_part
        self.check_draw(n, len(part), "dataset.data.calibration_size")
        labels = torch.tensor([_largest(self.splits["train"][p].objects) for p in part.tolist()])
        places = part[balanced(labels, n, seed)].tolist()
        pictures = Pictures(self, "train")
        images = [pictures[place, None][0] for place in places]
        return [torch.stack(images[at : at + batch_size]) for at in range(0, len(images), batch_size)]

    def example(self) -> Tensor:
        """One input as the network sees it, `[1, C, H, W]`: the first training image."""
        return Pictures(self, "train")[0, None][0][None]

    def decode(self, picture: Picture) -> Image.Image:
        """A picture as RGB, for any file format.

        Raises:
            QexpError: The file is damaged.
        """
        try:
            return rgb(self.load(picture))[0]
        except (OSError, BadImage) as error:
            raise QexpError(f"{picture.name}: cannot be decoded ({error}); fetch the image again") from error

    def pixels(self, image: Image.Image) -> Tensor:
        """An image squashed to the network's size, uint8 `[3, H, W]`."""
        squashed = image if image.size == self.size[::-1] else image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of images."""
        how = {"size": list(self.size), "corners": self.corners, "augment": self.augment}
        return {**asdict(self.normalize), **how}

    def notes(self) -> dict[str, Any]:
        """Columns about the images in the results: the calibration part, and counts of changed and dropped items."""
        part = f"{len(self.calibration_part)} images of the training side, seed {self.seed}"
        return {"calibration_from": part, **self.findings}

    def content_hash(self) -> str:
        """Returns a hash of annotations, images (as `read` identifies them) and preprocessing."""
        how = [self.normalize.identity(), self.size, self.normalize.channel_order, self.corners]
        digest = hashlib.sha256(json.dumps(how).encode())
        for split in self.splits.values():
            for picture in split:
                digest.update(f"{picture.name} {picture.source} {picture.size}".encode())
                for tensor in picture.objects:
                    digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def _largest(objects: Objects) -> int:
    """Returns the class of the largest object, or -1 without objects."""
    boxes = objects.boxes
    return int(objects.labels[(boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()]) if len(boxes) else -1
