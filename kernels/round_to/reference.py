"""Rounding in plain PyTorch."""

import torch
from torch import Tensor


def round_to(x: Tensor, rounding: str, noise: Tensor | None = None) -> Tensor:
    """Returns the float32 tensor `x` rounded to integers.

    The fraction `x - floor(x)` is exact where it matters; `floor(x + 0.5)` is not: it would round 0.49999997 to 1.
    """
    match rounding:
        case "half_even":
            return torch.round(x)
        case "floor":
            return torch.floor(x)
        case "trunc":
            return torch.trunc(x)
        case "half_up":
            low = torch.floor(x)
            return low + (x - low >= 0.5).to(x.dtype)
        case "half_away":
            low = torch.floor(x.abs())
            return torch.copysign(low + (x.abs() - low >= 0.5).to(x.dtype), x)
        case "stochastic":
            low = torch.floor(x)
            return low + (noise >= 1 - (x - low)).to(x.dtype)
    raise ValueError(f"rounding: {rounding!r}")
