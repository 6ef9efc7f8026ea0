"""Batch normalisation of a training step in plain PyTorch, with what follows it: a residual sum and a clamp."""

import torch
from torch import Tensor

from ..layout import along, like, wide


def _others(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    slope = weight.to(mean.dtype) / torch.sqrt(variance + eps)
    return (wide(x) - along(mean, x, 1)) * along(slope, x, 1) + along(bias.to(mean.dtype), x, 1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, eps: float, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the result, and mean and variance of each channel in this batch."""
    v = wide(x)
    variance, mean = (s.to(v.dtype) for s in torch.var_mean(v.double(), _others(x), correction=0))
    y = _normalized(x, weight, bias, mean, variance, eps)
    if added is not None:
        y = y + wide(added)
    return like(torch.clamp(y, low, high), x), mean, variance


def backward(
    grad: Tensor,
    more: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    low: float,
    high: float,
    added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, of what was added (no elements unless `added`), of weight and of bias.

    `y`, the result, is needed only where something was added and there are limits. `more` is added to `grad`.
    """
    result = _normalized(x, weight, bias, mean, variance, eps) if y is None else wide(y)
    both = wide(grad) if more is None else wide(grad) + wide(more)
    g = torch.where((result > low) & (result < high), both, 0)
    passed = like(g, x) if more is not None or y is not None else g
    centered, others = wide(x) - along(mean, x, 1), _others(x)
    total, product = g.double().sum(others), (g * centered).double().sum(others)
    deviation = torch.sqrt(variance + eps)
    slope = weight.to(mean.dtype) / deviation
    count = torch.full(
        (), x.numel() // x.shape[1], dtype=torch.float64, device=x.device
    )  # a number's reciprocal would be multiplied
    down = (slope / (variance + eps) * product / count).to(mean.dtype)
    dx = (
        wide(passed) * along(slope, x, 1)
        - centered * along(down, x, 1)
        - along((slope * total / count).to(mean.dtype), x, 1)
    )
    dweight = (product / deviation).to(weight.dtype)
    return like(dx, x), like(passed, x) if added else x.new_empty(0), dweight, total.to(weight.dtype)
