"""The GEMMLOWP affine quantizer in plain PyTorch."""

import torch
from torch import Tensor

from ..fake_quantize.reference import as_codes
from ..layout import along, like, limits_along, valid, wide
from ..round_to.reference import round_to


def _codes(
    x, scale, zero_point, shift, qmin, qmax, limits, axis, rounding, noise
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the codes (float32), and the parameters shaped to broadcast with `x`."""
    s, z, o = along(valid(scale), x, axis), along(zero_point, x, axis), along(shift, x, axis)
    v = (wide(x) - o) / s + z
    if noise is not None and rounding != "stochastic":
        v = v + (noise - 0.5)
    return round_to(torch.clamp(v, *limits_along(qmin, qmax, limits, x, axis)), rounding, noise), s, z, o


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    shift: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
    noise: Tensor | None,
) -> Tensor:
    """Returns `(codes - zero_point) * scale + shift`."""
    q, s, z, o = _codes(x, scale, zero_point, shift, qmin, qmax, limits, axis, rounding, noise)
    return like((q - z) * s + o, x)


def codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    shift: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
    noise: Tensor | None,
) -> Tensor:
    """Returns the codes as int32; NaN becomes the smallest int32."""
    return as_codes(_codes(x, scale, zero_point, shift, qmin, qmax, limits, axis, rounding, noise)[0], x)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    shift: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
) -> Tensor:
    """Returns the gradient where the code before noise and rounding lies within the limits."""
    v = (wide(x) - along(shift, x, axis)) / along(valid(scale), x, axis) + along(zero_point, x, axis)
    low, high = limits_along(qmin, qmax, limits, x, axis)
    return like(torch.where((v >= low) & (v <= high), grad, 0), x)
