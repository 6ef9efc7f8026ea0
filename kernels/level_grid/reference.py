"""Quantization to a table of levels in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import along, like, sum_like, valid, wide


def thresholds(levels: Tensor) -> Tensor:
    """Returns the largest number that still belongs to the lower of each two neighbouring levels: [L] -> [L - 1].

    Half-way values belong to the level of smaller magnitude (to the upper one where both are equally large).
    """
    low, high = levels[:-1], levels[1:]
    middle = (low + high) * 0.5
    return torch.where(low.abs() < high.abs(), middle, torch.nextafter(middle, middle.new_full((), -torch.inf)))


def _nearest(x: Tensor, levels: Tensor, scale: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    s = along(valid(scale), x, axis)
    v = wide(x) / s
    index = torch.bucketize(v.detach().contiguous(), thresholds(levels.to(v.dtype)), right=False)
    return torch.where(v.isnan(), v, levels[index]), v, s


def forward(x: Tensor, levels: Tensor, scale: Tensor, axis: int | None, clip_gradient: bool) -> Tensor:
    """Returns `scale` times the level nearest to `x / scale`."""
    q, _, s = _nearest(x, levels, scale, axis)
    return like(q * s, x)


def backward(
    grad: Tensor, x: Tensor, levels: Tensor, scale: Tensor, axis: int | None, clip_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and scale."""
    q, v, _ = _nearest(x, levels, scale, axis)
    inside = (v >= levels[0]) & (v <= levels[-1])
    dscale = sum_like(wide(grad) * torch.where(inside, q - v, q), scale, axis)
    return like(torch.where(inside, grad, 0) if clip_gradient else grad.clone(), x), dscale
