"""Images as a caller has them (a tensor, batches, a loader), as the data set that runs work with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qexp.data.contract import DataSet
from qexp.errors import QexpError

BATCH = 64  # images per batch, where a caller gives one tensor
ALLOWED = "a tensor [N, C, H, W], a list of such batches, or a loader of batches or (images, targets)"


class GivenImages(DataSet):
    """Batches of images that a caller gives, prepared as the network takes them; nothing is read, augmented or split.

    Args:
        images: A tensor `[N, C, H, W]`, a list of such batches, or an iterable of batches or of `(images, targets)`.
        most: Read this many images at most.

    Raises:
        QexpError: The images have another form, or there are none.
    """

    def __init__(self, images: Any, most: int | None = None) -> None:
        super().__init__()
        self.batches = list(_batches(images, most))
        if not self.batches:
            raise QexpError(f"images: got none; give {ALLOWED}")

    def setup(self, stage: str | None = None) -> None:
        """Reads nothing: the images are at hand."""

    def train_dataloader(self) -> Iterable[tuple[Tensor, Any]]:
        raise QexpError("images that are given to quantize, verify or export are not trained on")

    def val_dataloader(self) -> Iterable[tuple[Tensor, Any]]:
        return self.batches

    def test_dataloader(self) -> Iterable[tuple[Tensor, Any]]:
        return self.batches

    def calibration_batches(self, n: int, batch_size: int, seed: int) -> list[Tensor]:
        return [images for images, _ in self.batches]

    def example(self) -> Tensor:
        return self.batches[0][0][:1]

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {}

    def content_hash(self) -> str:
        raise QexpError("images that are given have no name; nothing is kept under it")

    def __len__(self) -> int:
        return sum(len(images) for images, _ in self.batches)


def _batches(images: Any, most: int | None) -> Iterator[tuple[Tensor, Any]]:
    """Yields `(images, targets)`; targets are None where there are none."""
    if isinstance(images, Tensor):
        images = images.split(BATCH) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable) or isinstance(images, str | dict):
        raise QexpError(f"images={type(images).__name__} is not allowed; give {ALLOWED}")
    left = most
    for batch in images:
        x, targets = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
        if isinstance(x, list | tuple) and len(x) == 1:  # a loader of a TensorDataset without targets
            x = x[0]
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise QexpError(
                f"images: a batch is {got}; each must be floating point [N, C, H, W], normalised as the network takes it"
            )
        if left is not None:
            x, targets = x[:left], None if targets is None else targets[:left]
            left -= len(x)
        if len(x):
            yield x.detach(), targets
        if left == 0:
            return


def is_labels(targets: Any) -> bool:
    """Returns whether targets are one class per image."""
    return (
        isinstance(targets, Tensor)
        and targets.ndim == 1
        and not targets.is_floating_point()
        and targets.dtype != torch.bool
    )
