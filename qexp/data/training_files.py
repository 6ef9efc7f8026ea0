"""Training batches read from image files: too many to pack, cropped again each epoch, the same for the same seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qexp.data.decode import BadImage, Resize, rgb
from qexp.data.listing import Listing
from qexp.data.tensors import Normalize
from qexp.errors import QexpError


class Order(Sampler):
    """Yields every position once per epoch in a new order, with the seed of its crop; both depend on seed and epoch."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[int, int]]:
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        order = torch.randperm(self.n, generator=generator).tolist()
        crops = torch.randint(2**62, (self.n,), generator=generator).tolist()
        return zip(order, crops)


class TrainingFiles(Dataset):
    """Images uint8 [3, crop, crop] with their labels: a random part of each image, every second one mirrored.

    Args:
        listing: The images.
        resize: Its crop and interpolation are used.
        scale: Least and greatest share of the image's area that a crop covers.
        flip: Mirror every second image.
    """

    def __init__(self, listing: Listing, resize: Resize, scale: Sequence[float] = (0.08, 1.0), flip: bool = True):
        self.listing, self.resize, self.scale, self.flip = listing, resize, tuple(scale), flip

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, int]:
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
        from torchvision.transforms import functional as F

        i, seed = drawn
        name = self.listing.names[i]
        try:
            image, _ = rgb(self.listing.source.read(name))
        except BadImage as error:
            raise QexpError(
                f"{self.listing.source.path}/{name} cannot be decoded: {error}; replace or remove it"
            ) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), [3 / 4, 4 / 3])
            mirrored = bool(torch.rand(()) < 0.5)
        side, how = self.resize.crop, InterpolationMode(self.resize.interpolation)
        image = F.resized_crop(image, top, left, height, width, [side, side], how)
        image = F.hflip(image) if self.flip and mirrored else image
        return F.pil_to_tensor(image), self.listing.labels[i]

    def loader(
        self,
        batch_size: int,
        normalize: Normalize,
        seed: int,
        drop_last: bool,
        workers: int | None,
        channels_last: bool,
    ) -> DataLoader:
        """Batches `(images [B, 3, H, W] float, labels [B] int64)`; the same for the same (seed, epoch) and any number of processes."""
        if workers is None:
            workers = min(len(os.sched_getaffinity(0)), 8)
        return DataLoader(
            self,
            batch_size,
            sampler=Order(len(self), seed),
            num_workers=workers,
            drop_last=drop_last,
            collate_fn=partial(_batch, normalize=normalize, channels_last=channels_last),
        )


def _batch(samples: list[tuple[Tensor, int]], normalize: Normalize, channels_last: bool) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return normalize(torch.stack(images)).contiguous(memory_format=memory_format), torch.tensor(labels)
