"""Boxes as distributions of distances, and training by task-aligned assignment: what anchor-free detectors do with their predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, complete_box_iou_loss


class AlignedBoxes(nn.Module):
    """Reads boxes off `[N, P, 4 * bins + classes]`: a distribution over distances for each side of a box, then the classes' scores.

    Row p belongs to a cell of one of the maps, ordered by map, down, across. The distance from the cell's centre to the left, upper,
    right and lower side, in cells, is the mean of `softmax` over 0..bins-1; a class's score is a `sigmoid`.

    The loss of a batch is `box * (1 - CIoU)` and `dfl` times the cross-entropy of the two bins around the true distance, both of the
    cells that predict a true box and weighted by their target, and `cls` times the binary cross-entropy of all scores; all divided by
    the sum of targets. A true box is predicted by the `top` cells inside it with the greatest `score^alpha * IoU^beta`; where several
    boxes want a cell, the one that overlaps most gets it. A cell's target is that product, scaled so that a box's greatest one is
    its greatest IoU.

    Source: distributions of distances: Li et al. 2020, arXiv:2006.04388, equations 5 and 6; assignment and targets: Feng et al. 2021,
    arXiv:2108.07755, section 3.2; CIoU: Zheng et al. 2019, arXiv:1911.08287.
    Differs from the paper: binary cross-entropy where task-aligned learning uses a focal loss, as YOLOv8 does.

    Args:
        cells: Down and across of each map.
        bins: Bins of a distance.
        classes: Number of classes.
        top: Cells that predict a true box.
        alpha, beta: Exponents of score and overlap.
        box, cls, dfl: Weights of the three losses.
    """

    def __init__(
        self,
        cells: Sequence[tuple[int, int]],
        bins: int = 16,
        classes: int = 20,
        top: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
    ) -> None:
        super().__init__()
        self.bins, self.classes, self.top, self.alpha, self.beta = bins, classes, top, alpha, beta
        self.box, self.cls, self.dfl = box, cls, dfl
        centres, sizes = [], []
        for down, across in cells:
            y, x = torch.meshgrid(torch.arange(down) + 0.5, torch.arange(across) + 0.5, indexing="ij")
            one = torch.tensor([1 / across, 1 / down])
            centres.append(torch.stack([x.flatten(), y.flatten()], 1) * one)
            sizes.append(one.expand(down * across, 2))
        self.register_buffer("centres", torch.cat(centres), persistent=False)  # [P, 2], x y in shares of the image
        self.register_buffer("sizes", torch.cat(sizes), persistent=False)  # [P, 2], of a cell

    def boxes(self, raw: Tensor) -> Tensor:
        """Returns the boxes `[N, P, 4]` as corners in shares of the image."""
        spread = raw[..., : 4 * self.bins].unflatten(-1, (4, self.bins)).softmax(-1)
        distance = (spread * torch.arange(self.bins, device=raw.device, dtype=raw.dtype)).sum(-1)
        return torch.cat(
            [self.centres - distance[..., :2] * self.sizes, self.centres + distance[..., 2:] * self.sizes], -1
        )

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores, as `Detector.decode` returns them."""
        return self.boxes(raw), raw[..., 4 * self.bins :].sigmoid()

    @torch.no_grad()
    def assign(self, scores: Tensor, boxes: Tensor, true: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns, of one image, the true box each cell predicts `[P]` (-1 for none), and the targets of its score `[P]`.

        Args:
            scores: `[P, classes]` in 0..1.
            boxes: Predicted boxes `[P, 4]`.
            true: True boxes `[n, 4]`, corners in shares.
            labels: Their classes `[n]`.
        """
        which = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
        target = boxes.new_zeros(len(boxes))
        if not len(true):
            return which, target
        overlap = box_iou(true, boxes).clamp_min(0)
        inside = ((self.centres >= true[:, None, :2]) & (self.centres <= true[:, None, 2:])).all(-1)
        aligned = scores[:, labels].T ** self.alpha * overlap**self.beta * inside
        candidates = torch.zeros_like(inside).scatter_(1, aligned.topk(min(self.top, len(boxes)), 1).indices, True)
        candidates &= inside
        # Without a cell of its own (a box smaller than a cell that holds no centre), the nearest cell predicts it.
        lonely = ~candidates.any(1)
        middle = (true[:, :2] + true[:, 2:]) / 2
        nearest = (self.centres - middle[:, None]).square().sum(-1).argmin(1)
        candidates[lonely, nearest[lonely]] = True
        overlap_of_candidates = torch.where(candidates, overlap, -1.0)
        best = overlap_of_candidates.argmax(0)
        chosen = candidates.any(0)
        which[chosen] = best[chosen]
        mine = F.one_hot(best, len(true)).T.bool() & candidates
        aligned, overlap = aligned * mine, overlap * mine
        scale = overlap.amax(1, keepdim=True) / aligned.amax(1, keepdim=True).clamp_min(1e-9)
        return which, (aligned * scale).amax(0)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Returns the loss of one batch, divided by the sum of its targets."""
        found, logits = self.boxes(raw), raw[..., 4 * self.bins :]
        wanted, total, weights = torch.zeros_like(logits), raw.sum() * 0, 0.0
        for image, (true, label) in enumerate(zip(boxes, labels)):
            which, target = self.assign(logits[image].sigmoid(), found[image], true, label)
            rows = which >= 0
            if not bool(rows.any()):
                continue
            wanted[image, rows, label[which[rows]]] = target[rows]
            weight, goal = target[rows], true[which[rows]]
            place = complete_box_iou_loss(found[image, rows], goal, reduction="none")
            total = total + (weight * (self.box * place + self.dfl * self.spread_loss(raw[image], rows, goal))).sum()
            weights = weights + weight.sum()
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return (total + self.cls * entropy) / torch.as_tensor(weights, device=raw.device).clamp_min(1.0)

    def spread_loss(self, raw: Tensor, rows: Tensor, goal: Tensor) -> Tensor:
        """Returns, for each row, the mean cross-entropy of the two bins around the true distance of each side `[n]`."""
        centre, size = self.centres[rows], self.sizes[rows]
        true = torch.cat([centre - goal[:, :2], goal[:, 2:] - centre], 1) / size.repeat(1, 2)
        true = true.clamp(0, self.bins - 1 - 0.01)
        lower = true.floor().long()
        log = raw[rows, : 4 * self.bins].unflatten(-1, (4, self.bins)).log_softmax(-1)
        near = log.gather(-1, lower[..., None]).squeeze(-1) * (lower + 1 - true)
        far = log.gather(-1, lower[..., None] + 1).squeeze(-1) * (true - lower)
        return -(near + far).mean(-1)
