"""The base class of detectors: one tensor of images in, one tensor of raw predictions out; decoding gives boxes afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Detector(nn.Module):
    """A network `[N, C, H, W] -> [N, P, K]`: K numbers for each of P candidate boxes, in a fixed order.

    `forward` holds everything that can carry a quantizer. The two methods define the meaning of the numbers; they compute in float
    and never inside `forward`.
    """

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The boxes `[N, P, 4]`, corners x1 y1 x2 y2 in shares of the image's width and height, and scores `[N, P, classes]` in 0..1."""
        raise NotImplementedError

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """The training loss of one batch, for each image's true boxes `[n, 4]` (corners, shares) and labels `[n]`, 0..classes-1."""
        raise NotImplementedError


def corners(boxes: Tensor) -> Tensor:
    """Boxes `[..., 4]` given as centre x y, width, height, as corners x1 y1 x2 y2."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)
