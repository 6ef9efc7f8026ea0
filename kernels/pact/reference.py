"""Quantization with a learned clip value in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import along, like, sum_like, valid, wide
from ..round_to.reference import round_to


def forward(x: Tensor, alpha: Tensor, levels: float, two_sided: bool, axis: int | None, rounding: str) -> Tensor:
    """Returns `x` clipped to [0, alpha] (or [-|alpha|, |alpha|]) on the grid of step `|alpha| / levels`."""
    size = alpha.abs() if two_sided else alpha
    # Divides by a tensor: torch divides by a number exactly on the CPU, but on CUDA multiplies by its reciprocal.
    s = along(valid(size / torch.full_like(size, levels)), x, axis)
    v = torch.clamp(wide(x) / s, -levels if two_sided else 0.0, levels)
    return like(round_to(v, rounding) * s, x)


def backward(grad: Tensor, x: Tensor, alpha: Tensor, two_sided: bool, axis: int | None) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and alpha."""
    a = along(valid(alpha.abs() if two_sided else alpha), x, axis)
    v, g = wide(x), wide(grad)
    dx = torch.where((v >= (-a if two_sided else 0.0)) & (v <= a), grad, 0)
    dalpha = torch.where(v >= a, g, 0)
    if two_sided:
        dalpha = torch.where(v <= -a, -g, dalpha)
    dalpha = sum_like(dalpha, alpha, axis)
    return like(dx, x), dalpha * alpha.sign() if two_sided else dalpha
