"""The mapping to another grid in plain PyTorch: the reference for every other implementation."""

import torch
from torch import Tensor

from ..layout import along
from ..round_to.reference import round_to


def forward(
    x: Tensor, factor: Tensor, summand: Tensor, low: float, high: float, rounding: str, dtype: torch.dtype
) -> Tensor:
    """Returns `clip(round(x * factor + summand), low, high)`."""
    axis = 1 if x.dim() > 1 else None
    y = x.double() * along(factor, x, axis) + along(summand, x, axis)
    y = round_to(y, rounding, None).clamp(low, high).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    return y if y.stride() == out.stride() else out.copy_(y)
