"""The golden vectors of an entry of the zoo: made-up images, and what its network computes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qexp.data.contract import DataSet
from qexp.layers.swap import baked_weights

COUNT, ROOM = 8, 400_000  # images, and most numbers that they hold together


@dataclass(frozen=True)
class Golden:
    """The golden vectors of an entry.

    Attributes:
        images: Made-up images `[N, C, H, W]`.
        outputs: What the simulated network computes of them.
        codes, scores: The program's codes of the images and of their scores; None without a program.
    """

    images: Tensor
    outputs: Tensor
    codes: NDArray[np.int64] | None
    scores: NDArray[np.int64] | None

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray]) -> Golden:
        """Returns the vectors that a file holds."""
        codes, scores = (arrays[name].astype(np.int64) if name in arrays else None for name in ("codes", "scores"))
        return cls(images_of(arrays), torch.from_numpy(np.array(arrays["outputs"])), codes, scores)


def images_of(arrays: Mapping[str, NDArray]) -> Tensor:
    """Returns images whose 256 shades lie evenly between the darkest and the brightest value of each channel."""
    dark, bright = (arrays[name].reshape(1, -1, 1, 1) for name in ("dark", "bright"))
    return torch.from_numpy(dark + arrays["shades"].astype(np.float32) * ((bright - dark) / np.float32(255)))


@torch.no_grad()
def simulated(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the outputs of a quantized network."""
    with baked_weights(model):
        return model.eval()(images)


def made_up(data: DataSet) -> tuple[Tensor, dict[str, NDArray]]:
    """Returns made-up images `[N, C, H, W]` between the darkest and brightest values of the data set, and the arrays that hold them.

    Blocks of random shades of several sizes, one on top of the other: no image of the data set is copied.
    """
    real = torch.cat(data.calibration_batches(32, 32, 0)).float()
    channels, height, width = real.shape[1:]
    count = max(1, min(COUNT, ROOM // real[0].numel()))
    random = np.random.RandomState(0)
    shades = np.zeros((count, channels, height, width), np.int64)
    for size in (2, 5, 11):
        blocks = random.randint(0, 86, (count, channels, size, size))
        rows, columns = (np.arange(n) * size // n for n in (height, width))
        shades += blocks[:, :, rows][:, :, :, columns]
    ends = [pick(real.transpose(0, 1).reshape(channels, -1), 1).values for pick in (torch.min, torch.max)]
    arrays = {"shades": shades.astype(np.uint8), "dark": ends[0].numpy(), "bright": ends[1].numpy()}
    return images_of(arrays), arrays
