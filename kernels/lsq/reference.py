"""Learned step size quantization in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import along, like, limits_along, sum_like, valid, wide
from ..round_to.reference import round_to


def _steps(x, scale, offset, axis) -> tuple[Tensor, Tensor, Tensor | None]:
    s = along(valid(scale), x, axis)
    if offset is None:
        return wide(x) / s, s, None
    b = along(offset, x, axis)
    return (wide(x) - b) / s, s, b


def forward(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
    grad_scale: float,
) -> Tensor:
    """Returns `codes * scale (+ offset)`."""
    v, s, b = _steps(x, scale, offset, axis)
    y = round_to(torch.clamp(v, *limits_along(qmin, qmax, limits, x, axis)), rounding) * s
    return like(y if b is None else y + b, x)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, scale and offset (an empty tensor without offset)."""
    v, _, _ = _steps(x, scale, offset, axis)
    low, high = limits_along(qmin, qmax, limits, x, axis)
    codes = round_to(torch.clamp(v, low, high), rounding)
    inside = (v > low) & (v < high)
    g = wide(grad)
    dscale = sum_like(g * torch.where(inside, codes - v, codes), scale, axis) * grad_scale
    if offset is None:
        doffset = scale.new_empty(0)
    else:
        doffset = sum_like(torch.where(inside, 0, g), offset, axis) * grad_scale
    return like(torch.where(inside, grad, 0), x), dscale, doffset
