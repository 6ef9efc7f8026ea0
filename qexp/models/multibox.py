"""SSD's boxes: the priors, the decoding of raw predictions relative to them, and the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from qexp.models.detector import corners


class Map(NamedTuple):
    """One feature map of a detector: cells per side, pixels from cell to cell, and its boxes in pixels."""

    cells: int
    step: float
    least: float
    greatest: float
    ratios: tuple[int, ...]

    @property
    def boxes(self) -> int:
        """Boxes per cell: two squares, and two of each ratio."""
        return 2 + 2 * len(self.ratios)


RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
SIZES = {  # of the priors, in pixels of a 300-pixel image: published for VOC, and torchvision's
    "voc": (30, 60, 111, 162, 213, 264, 315),
    "torchvision": (21, 45, 99, 153, 207, 261, 315),
}


def ssd300_maps(sizes: str = "voc", cells: Sequence[int] = (38, 19, 10, 5, 3, 1)) -> list[Map]:
    """The six maps of SSD300; cells at the published steps, or evenly spaced for maps of other sizes."""
    steps = (8, 16, 32, 64, 100, 300) if tuple(cells) == (38, 19, 10, 5, 3, 1) else tuple(300 / n for n in cells)
    least = SIZES[sizes]
    return [Map(*one) for one in zip(cells, steps, least, least[1:], RATIOS)]


def priors(maps: Sequence[Map], size: int = 300, clip_centres: bool = True) -> Tensor:
    """The prior boxes `[P, 4]` as centre x y, width, height in shares of the image, clipped to 0..1 (torchvision: the sides alone).

    Ordered by map, row, column; of a cell the square of the least side, that of the mean side `sqrt(least * greatest)`, then for each
    ratio the wide and the tall box.

    Source: Liu et al. 2016, arXiv:1512.02325, section 2.2, in the order of the published implementation.
    """
    rows = []
    for one in maps:
        side, mean = one.least / size, math.sqrt(one.least * one.greatest) / size
        shapes = [(side, side), (mean, mean)]
        for ratio in one.ratios:
            root = math.sqrt(ratio)
            shapes += [(side * root, side / root), (side / root, side * root)]
        for y, x in product(range(one.cells), repeat=2):
            centre = ((x + 0.5) * one.step / size, (y + 0.5) * one.step / size)
            rows += [(*centre, *shape) for shape in shapes]
    table = torch.tensor(rows, dtype=torch.float64).float()
    return torch.cat([table[:, :2].clamp(0, 1) if clip_centres else table[:, :2], table[:, 2:].clamp(0, 1)], 1)


class MultiBox(nn.Module):
    """Reads boxes off `[N, P, 4 + 1 + classes]`: offsets from the prior, then scores of background and of each class.

    A centre is `prior centre + 0.1 * t * prior size`, a side `prior side * exp(0.2 * t)`, scores are a softmax.

    The loss is smooth L1 of the offsets of positive priors and cross-entropy of all positives and of the hardest negatives, three to each
    positive, summed and divided by the number of positives. Positive is the best prior of each true box, and every prior that overlaps
    one by at least a half.

    Source: Liu et al. 2016, arXiv:1512.02325, section 2.2 (matching, equations 1 to 3, hard negative mining).

    Args:
        boxes: Priors `[P, 4]` as centre x y, width, height in shares.
        variances: Factors of the offsets, of centres and of sides.
        negatives: Negatives trained on for each positive.
    """

    def __init__(self, boxes: Tensor, variances: tuple[float, float] = (0.1, 0.2), negatives: int = 3) -> None:
        super().__init__()
        self.register_buffer("priors", boxes, persistent=False)
        self.variances, self.negatives = variances, negatives

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores, as `Detector.decode` returns them."""
        centre = self.priors[:, :2] + raw[..., :2] * self.variances[0] * self.priors[:, 2:]
        size = self.priors[:, 2:] * (raw[..., 2:4] * self.variances[1]).exp()
        return corners(torch.cat([centre, size], -1)), raw[..., 4:].softmax(-1)[..., 1:]

    def encode(self, boxes: Tensor) -> Tensor:
        """The offsets `[P, 4]` that make each prior the box (corners) in the same row."""
        centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        shift = (centre - self.priors[:, :2]) / (self.variances[0] * self.priors[:, 2:])
        return torch.cat([shift, (size / self.priors[:, 2:]).clamp_min(1e-6).log() / self.variances[1]], 1)

    def assign(self, true: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For each prior its target box `[P, 4]` (corners) and its class `[P]`, 0 for background."""
        kinds = torch.zeros(len(self.priors), dtype=torch.int64, device=true.device)
        if not len(true):
            return self.priors.new_zeros(len(self.priors), 4), kinds
        overlaps = box_iou(true, corners(self.priors))
        overlap, which = overlaps.max(0)
        # If two boxes have the same best prior, the later box gets it.
        for number, best in enumerate(overlaps.argmax(1).tolist()):
            overlap[best], which[best] = 2.0, number
        return true[which], torch.where(overlap >= 0.5, labels[which] + 1, kinds)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """The loss of one batch."""
        with torch.no_grad():
            pairs = [self.assign(true, label) for true, label in zip(boxes, labels)]
            targets = torch.stack([self.encode(box) for box, _ in pairs])
            kinds = torch.stack([kind for _, kind in pairs])
        positive = kinds > 0
        place = F.smooth_l1_loss(raw[..., :4][positive], targets[positive], reduction="sum")
        entropy = F.cross_entropy(raw[..., 4:].transpose(1, 2), kinds, reduction="none")
        with torch.no_grad():
            rank = entropy.masked_fill(positive, -1.0).argsort(1, descending=True).argsort(1)
            wanted = (self.negatives * positive.sum(1)).clamp(max=kinds.shape[1] - 1)
            hard = (rank < wanted[:, None]) & ~positive
        return (place + entropy[positive | hard].sum()) / positive.sum().clamp_min(1)
