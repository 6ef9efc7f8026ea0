"""Restoration: images made clean again, scored by the peak signal-to-noise ratio in decibels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from qexp.tasks.base import Score, Task

Z95 = 1.959963984540054


class Restoration(Task):
    """Trains and scores a network `[N, C, H, W] -> [N, C, H, W]`; a target is the clean image, its values in 0..1.

    The score is the mean over images of `-10 log10(mean squared error)`, for a peak of 1. It is in decibels and is not a share.

    Args:
        model: The network.
        learning: Arguments of `Task`: optimizer, scheduler, groups, freeze_bn.
    """

    metric, label, unit, is_share = "psnr", "PSNR", "dB", False

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    def evidence(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        """Returns each image's decibels `[N]`; 100 for an image without an error."""
        error = (outputs.cpu().double() - targets.cpu().double()).square().flatten(1).mean(1)
        return -10 * error.clamp_min(1e-10).log10().numpy()

    def score_of(self, evidence: Sequence[np.ndarray]) -> Score:
        ratios = np.concatenate([np.zeros(0), *evidence])
        n = len(ratios)
        mean = float(ratios.mean()) if n else math.nan
        half = Z95 * float(ratios.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return self.scored(mean, mean - half, mean + half, "normal, over images", n, outcomes={"psnr": ratios})
