"""Batch norms beside their convolutions, and the batch norm that only adds a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def norm_after(model: nn.Module) -> dict[str, tuple[str, float]]:
    """Returns the batch norm (name, eps) that is registered next after each convolution without a bias."""
    found: dict[str, tuple[str, float]] = {}
    waiting: tuple[str, int] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            waiting = (name, module.out_channels) if module.bias is None else None
        elif isinstance(module, nn.BatchNorm2d) and waiting and waiting[1] == module.num_features:
            found[waiting[0]], waiting = (name, module.eps), None
    return found


def identity_norm(bias: Tensor, eps: float) -> dict[str, Tensor]:
    """Returns the state of a batch norm that is the identity plus a bias `[C]`: its weight undoes the eps beside a variance of 1."""
    return {
        "weight": torch.full_like(bias, (1 + eps) ** 0.5),
        "bias": bias,
        "running_mean": torch.zeros_like(bias),
        "running_var": torch.ones_like(bias),
    }
