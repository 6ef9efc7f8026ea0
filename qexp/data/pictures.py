"""Loading of a detection set's pictures: decoded, augmented, and the same for the same (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from qexp.data.annotations import Objects

Target = dict[str, Tensor]


class Picture(NamedTuple):
    """One annotated image: how to get its bytes, and its objects, boxes in shares of its width and height."""

    name: str
    source: Any  # any value that `load` of its data set accepts
    size: tuple[int, int]  # width, height in pixels
    objects: Objects


class Album(Protocol):
    """The interface of a data set that `Pictures` needs."""

    splits: dict[str, list[Picture]]

    def decode(self, picture: Picture) -> Image.Image:
        """Returns a picture as RGB."""

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns an image in the network's size, uint8 `[3, H, W]`."""

    def normalize(self, images: Tensor) -> Tensor:
        """Returns images in the form of the network's input."""


class Draws(Sampler[tuple[int, int]]):
    """Yields (place, seed of its augmentation) in a new order each epoch, determined by `seed` and the epoch's number.

    Args:
        places: Places of the split to visit.
        seed: Seed of order and augmentation.
    """

    def __init__(self, places: Tensor, seed: int) -> None:
        self.places, self.seed, self.epoch = places, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        seeds = generator.integers(0, 2**62, len(self.places))
        for at in generator.permutation(len(self.places)):
            yield int(self.places[at]), int(seeds[at])


class Pictures(Dataset):
    """A split, indexed by (place, seed): image as the network takes it and its target; without a seed nothing is random.

    Args:
        data: The data set, which loads and prepares pictures.
        split: `train` or `test`.
        augment: Draw crop, mirroring and colours from the seed.
        keep: Number of squashed images kept in memory once decoded.
    """

    def __init__(self, data: Album, split: str, augment: bool = False, keep: int = 0) -> None:
        self.data, self.pictures, self.augment, self.keep = data, data.splits[split], augment, keep
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: tuple[int, int | None]) -> tuple[Tensor, Target]:
        place, seed = at
        picture = self.pictures[place]
        boxes, labels, difficult = picture.objects
        if seed is not None and self.augment:
            from qexp.data.detection_augment import augmented

            image, boxes, kept = augmented(self.data.decode(picture), boxes, seed)
            pixels, labels, difficult = self.data.pixels(image), labels[kept], difficult[kept]
        else:
            pixels = self._plain(place)
        return self.data.normalize(pixels), {"boxes": boxes, "labels": labels, "difficult": difficult}

    def _plain(self, place: int) -> Tensor:
        if place in self.kept:
            return self.kept[place]
        pixels = self.data.pixels(self.data.decode(self.pictures[place]))
        if len(self.kept) < self.keep:
            self.kept[place] = pixels
        return pixels


def collate(items: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """A batch: the images stacked, the targets side by side."""
    images, targets = zip(*items)
    return torch.stack(images), list(targets)
