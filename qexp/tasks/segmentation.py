"""Segmentation: cross-entropy of each pixel, and the mean intersection over union of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.tasks.base import Score, Task

DRAWS = 500


class Segmentation(Task):
    """Trains and scores a network `[N, C, H, W] -> [N, classes, H, W]`; a target is a map of classes `[N, H, W]`.

    The score counts the pixels of all images together. Per class, it divides the pixels that are in both the map and the prediction by
    those in either; then it averages over the classes that occur. Pixels of a class below 0 are not counted.

    Args:
        model: The network.
        num_classes: Number of classes.
        learning: Arguments of `Task`: optimizer, scheduler, groups, freeze_bn.
    """

    metric, label = "miou", "mIoU"

    def __init__(self, model: nn.Module, num_classes: int, **learning: Any) -> None:
        super().__init__(model, **learning)
        self.num_classes = num_classes

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, ignore_index=-1)

    def decisions(self, outputs: Tensor) -> Tensor:
        """Returns the class of each pixel `[N, H, W]`."""
        return outputs.argmax(1)

    def divergence(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Returns the mean Kullback-Leibler divergence of each image's pixels, in nats `[N]`."""
        log_q, log_p = nn.functional.log_softmax(outputs, 1), nn.functional.log_softmax(wanted, 1)
        return (log_p.exp() * (log_p - log_q)).sum(1).flatten(1).mean(1)

    def evidence(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        """Returns, per image and class, the number of pixels in both map and prediction, and in either: `[N, 2, classes]`."""
        found, true = self.decisions(outputs).cpu(), targets.cpu()
        counted = (true >= 0)[:, None]
        classes = torch.arange(self.num_classes)[:, None, None]
        ours, theirs = (maps[:, None] == classes for maps in (found, true))
        both, either = (ours & theirs & counted, (ours | theirs) & counted)
        return torch.stack([both.flatten(2).sum(2), either.flatten(2).sum(2)], 1).numpy()

    def score_of(self, evidence: Sequence[np.ndarray]) -> Score:
        counts = np.concatenate([np.zeros((0, 2, self.num_classes), np.int64), *evidence])
        n, draw = len(counts), np.random.default_rng(0)
        drawn = [mean_iou(counts[draw.integers(0, n, n)].sum(0)) for _ in range(DRAWS if n else 0)]
        low, high = np.nanquantile(drawn, [0.025, 0.975]) if drawn else (math.nan, math.nan)
        how = f"bootstrap over images, {DRAWS} draws"
        return self.scored(mean_iou(counts.sum(0)), float(low), float(high), how, n)


def mean_iou(counts: np.ndarray) -> float:
    """Returns the mean over classes of the ratio of pixels in both to pixels in either `[2, classes]`; NaN without a class."""
    both, either = counts
    return float((both[either > 0] / either[either > 0]).mean()) if (either > 0).any() else math.nan
