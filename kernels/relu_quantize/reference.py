"""ReLU followed by uniform quantization, in plain PyTorch."""

import torch
from torch import Tensor

from ..fake_quantize import reference as uniform


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
) -> Tensor:
    """Returns `fake_quantize(relu(x))`."""
    return uniform.forward(torch.relu(x), scale, zero_point, qmin, qmax, limits, axis, rounding, None)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
) -> Tensor:
    """Returns the gradient where `x > 0` and the code lies within the limits."""
    dx = uniform.backward(grad, torch.relu(x), scale, zero_point, qmin, qmax, limits, axis)
    return torch.where(x > 0, dx, 0)
