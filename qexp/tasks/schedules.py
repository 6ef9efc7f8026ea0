"""Learning-rate schedules, stepped once an optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> LambdaLR:
    """Returns a half cosine from the optimizer's rate down to `final` times it, after a linear warm-up.

    Args:
        optimizer: Its rates are the peak.
        total_steps: Optimizer steps of the whole training.
        warmup: Share of the steps that rise linearly from near zero.
        final: Rate at the end, as a share of the peak.
    """
    rising = int(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min((step - rising) / max(total_steps - rising, 1), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def steps(optimizer: Optimizer, total_steps: int, at: tuple[float, ...] = (0.5, 0.75), gamma: float = 0.1) -> LambdaLR:
    """Returns a schedule that multiplies the rate by `gamma` at each share of the training in `at`."""
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= share * total_steps for share in at))


def constant(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Returns a schedule that leaves the rate alone."""
    return LambdaLR(optimizer, lambda step: 1.0)
