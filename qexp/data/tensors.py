"""Batches cut from images that lie in memory as uint8: no workers, no decoding, a whole batch augmented at once."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qexp.errors import QexpError


@dataclass(frozen=True)
class Augment:
    """Random crop from the image with `padding` black pixels around it, then a horizontal flip of every second one."""

    padding: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
        """Images [N, C, H, W] moved by `shift` [N, 2] in 0..2*padding and mirrored where `mirrored` [N] is true."""
        if self.padding:
            height, width = images.shape[-2:]
            windows = F.pad(images, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(len(images)), :, shift[:, 0], shift[:, 1]]
        if self.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


@dataclass(frozen=True)
class Normalize:
    """Float images `(x / max_value - mean) / std` of uint8 images in RGB, as a checkpoint needs them.

    Networks that come from Caffe take blue first and subtract a mean from 0..255 without scaling:
    `Normalize((104, 117, 123), (1, 1, 1), max_value=1, channel_order="bgr")`.

    Attributes:
        mean, std: Mean and standard deviation of each channel, in the checkpoint's order, after the division by `max_value`.
        max_value: Divisor of pixel values.
        size: Side of the resized images in pixels; None keeps their size.
        channel_order: Channel order of the checkpoint, `rgb` or `bgr`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_value: float = 255.0
    size: int | None = None
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        if self.channel_order not in ("rgb", "bgr"):
            raise QexpError(f"channel_order={self.channel_order!r} is not allowed; use rgb or bgr")
        if self.channel_order == "bgr" and len(self.mean) != 3:
            raise QexpError(
                f"channel_order=bgr, but mean={list(self.mean)}: only images of three channels have an order"
            )
        if not self.max_value > 0:
            raise QexpError(
                f"max_value={self.max_value} is not allowed; use a number above 0: 255, or 1 to keep 0..255"
            )

    def identity(self) -> dict[str, Any]:
        """Returns a key of the normalisation; it omits RGB, so that earlier cached results stay valid."""
        own = asdict(self)
        if self.channel_order == "rgb":
            del own["channel_order"]
        return own

    def __call__(self, images: Tensor) -> Tensor:
        if self.channel_order == "bgr":
            images = images.flip(-3)
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        x = images.float() / self.max_value
        if self.size is not None and self.size != x.shape[-1]:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return x.sub_(mean).div_(std)


class TensorLoader:
    """Yields `(images [B, C, H, W] float, labels [B] int64)` batches, the same ones for the same (seed, epoch).

    The order and every random crop and flip of an epoch depend only on `seed` and the epoch number, so a run that
    resumes at epoch k uses the same batches as an uninterrupted run. Lightning finds `set_epoch` through `sampler`. Under
    torch.distributed each rank takes every world-size-th image; with `shuffle` the ranks get the same number (a few images
    occur twice), without it each image occurs exactly once.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        batch_size: Images per batch on each rank.
        normalize: Conversion from uint8 to the network's input.
        indices: Positions in `images` to use; all by default.
        augment: Random crops and flips; none by default.
        shuffle: A new order each epoch instead of the given one.
        seed: Seed of order and augmentation.
        drop_last: Drop a last batch that is not full.
        channels_last: Memory format of the batches.
    """

    batch_sampler = None  # Lightning reads it wherever there is a `sampler`

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        normalize: Normalize,
        *,
        indices: Tensor | Sequence[int] | None = None,
        augment: Augment | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise QexpError(f"TensorLoader: batch_size={batch_size} is not allowed; use 1 or more")
        self.images, self.labels = images, labels
        self.indices = torch.arange(len(images)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        self.batch_size, self.normalize, self.augment = batch_size, normalize, augment
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.epoch = 0

    @property
    def sampler(self) -> "TensorLoader":
        """Returns itself; Lightning looks here for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _shard(self) -> Tensor:
        """The places of the epoch's order that this rank visits."""
        n = len(self.indices)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return torch.arange(n)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        end = -(-n // world) * world if self.shuffle else n
        return torch.arange(rank, end, world) % max(n, 1)

    def __len__(self) -> int:
        n = len(self._shard())
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.indices)
        # Draws for the whole set at once, so that the numbers do not depend on the batch size or the number of ranks.
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        augment = self.augment or Augment()
        shift = torch.randint(0, 2 * augment.padding + 1, (n, 2), generator=generator)
        mirrored = torch.rand(n, generator=generator) < 0.5
        for number, places in enumerate(self._shard().split(self.batch_size)):
            if number == len(self):
                return
            chosen = self.indices[order[places]]
            images = augment(self.images[chosen], shift[places], mirrored[places])
            yield self.normalize(images).contiguous(memory_format=self.memory_format), self.labels[chosen]
