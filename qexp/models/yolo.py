"""Decoding of YOLO's raw predictions: boxes from anchors, scores, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, complete_box_iou_loss

from qexp.models.detector import corners


class Head(NamedTuple):
    """One output map: its cells, its anchors in pixels of the input, and options of its `[yolo]` section."""

    cells: tuple[int, int]  # down, across
    anchors: list[tuple[float, float]]  # width, height
    scale_xy: float = 1.0  # how far beyond its cell a centre may lie
    ignore: float = 0.5  # a box that overlaps a true one by more is not trained towards background
    iou_weight: float = 1.0


class Yolo(nn.Module):
    """Reads boxes off `[N, P, 5 + classes]`: x, y, width, height, objectness, classes, for every anchor of every cell.

    Rows are ordered by head, anchor, cell (across first). A centre is `cell + s * sigmoid(t) - (s - 1) / 2` with the head's
    `scale_xy` s, a side `anchor * exp(t)`, a class's score `sigmoid(objectness) * sigmoid(class)`.

    The loss is the complete-IoU loss of each true box's anchors, cross-entropy of objectness everywhere but where a prediction overlaps
    a true box by more than `ignore`, and of the classes. The best anchor over all heads predicts a true box.

    Source: Redmon, Farhadi 2018, arXiv:1804.02767, section 2; scale_xy and the IoU loss: Bochkovskiy et al. 2020, arXiv:2004.10934.
    Differs from the paper: only the best anchor predicts a box, not all above a threshold.

    Args:
        heads: The output maps in the order of their rows.
        size: Width and height of the input in pixels.
    """

    def __init__(self, heads: Sequence[Head], size: tuple[int, int]) -> None:
        super().__init__()
        self.ignore, self.iou_weight = heads[0].ignore, heads[0].iou_weight
        rows = []
        for head in heads:
            down, across = head.cells
            y, x = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
            for width, height in head.anchors:
                one = torch.tensor([across, down, width / size[0], height / size[1], head.scale_xy])
                rows.append(torch.cat([torch.stack([x.flatten(), y.flatten()], 1), one.expand(down * across, 5)], 1))
        table = torch.cat(rows).float()
        for name, columns in (
            ("cell", slice(0, 2)),
            ("cells", slice(2, 4)),
            ("anchor", slice(4, 6)),
            ("scale_xy", slice(6, 7)),
        ):
            self.register_buffer(name, table[:, columns].contiguous(), persistent=False)

    def boxes(self, raw: Tensor) -> Tensor:
        """The boxes `[N, P, 4]` as corners in shares of the image."""
        offset = raw[..., :2].sigmoid() * self.scale_xy - (self.scale_xy - 1) / 2
        centre, size = (self.cell + offset) / self.cells, self.anchor * raw[..., 2:4].clamp(max=10).exp()
        return corners(torch.cat([centre, size], -1))

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores, as `Detector.decode` returns them."""
        return self.boxes(raw), raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """The loss of one batch, summed over boxes and divided by their number."""
        found = self.boxes(raw)
        total, n = raw.sum() * 0, max(sum(map(len, boxes)), 1)
        for image, (true, label) in enumerate(zip(boxes, labels)):
            objectness = raw[image, :, 4]
            target, counted = torch.zeros_like(objectness), torch.ones_like(objectness, dtype=torch.bool)
            if len(true):
                counted = box_iou(found[image].detach(), true).amax(1) <= self.ignore
                rows = self.responsible(true)
                target[rows], counted[rows] = 1.0, True
                place = complete_box_iou_loss(found[image, rows], true, reduction="sum")
                kind = F.one_hot(label, raw.shape[-1] - 5).to(raw.dtype)
                total = total + self.iou_weight * place
                total = total + F.binary_cross_entropy_with_logits(raw[image, rows, 5:], kind, reduction="sum")
            per_row = F.binary_cross_entropy_with_logits(objectness, target, reduction="none")
            total = total + (per_row * counted).sum()
        return total / n

    def responsible(self, true: Tensor) -> Tensor:
        """The row `[n]` that predicts each box `[n, 4]`: the anchor of the most similar size, in the cell of the box's centre."""
        centre, size = (true[:, :2] + true[:, 2:]) / 2, true[:, 2:] - true[:, :2]
        both = torch.minimum(size[:, None], self.anchor).prod(-1)
        overlap = both / (size.prod(-1)[:, None] + self.anchor.prod(-1) - both)
        here = ((centre[:, None] * self.cells).floor().minimum(self.cells - 1) == self.cell).all(-1)
        return (overlap * here).argmax(1)
