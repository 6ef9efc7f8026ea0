"""Learning-rate schedules, with one step per optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> LambdaLR:
    """Returns a half cosine from the optimizer's rate down to `final` times it, after a linear warm-up.

    Args:
        optimizer: The optimizer whose rates are the peak.
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
    """Returns a schedule that multiplies the rate by `gamma` at each share of the training in `at`: 0.3 is epoch 60 of 200."""
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= share * total_steps - 1e-6 for share in at))


def exponential(optimizer: Optimizer, total_steps: int, gamma: float = 0.97, epochs: int = 1) -> LambdaLR:
    """Returns a schedule that multiplies the rate by `gamma` after each of `epochs` equal parts of the training."""
    parts = max(epochs, 1)
    return LambdaLR(optimizer, lambda step: gamma ** min(step * parts // max(total_steps, 1), parts))


def onecycle(
    optimizer: Optimizer, total_steps: int, rising: float = 0.3, start: float = 0.04, final: float = 4e-6
) -> LambdaLR:
    """Returns one cycle of cosines: from `start` times the rate up to the rate over `rising` of the steps, then to `final` times.

    Source: Smith, Topin 2017 (arXiv 1708.07120), in the form of `torch.optim.lr_scheduler.OneCycleLR`.
    Differs from the source: momentum stays as it is.
    """
    top = rising * total_steps - 1

    def factor(step: int) -> float:
        if step <= top:
            return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * step / top)) if top > 0 else 1.0
        done = min((step - top) / max(total_steps - 1 - top, 1), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Returns a schedule that keeps the rate constant."""
    return LambdaLR(optimizer, lambda step: 1.0)
