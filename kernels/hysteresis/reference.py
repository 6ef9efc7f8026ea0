"""Binarisation with hysteresis in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import like, wide


def forward(latent: Tensor, state: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Returns the new signs and the mean magnitude of the latent weights."""
    if tau == 0:
        new = torch.where(latent < 0, -1, 1).to(state.dtype)
        new = torch.where(latent.isnan(), state, new)
    else:
        w = wide(latent)
        new = torch.where(w >= tau, 1, torch.where(w <= -tau, -1, state)).to(state.dtype)
    total = latent.abs().sum(dtype=torch.float64)
    return like(new, state), (total / torch.full_like(total, max(latent.numel(), 1))).to(torch.float32)
