"""The GEMMLOWP affine quantizer in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import along, like, wide
from ..round_to.reference import round_to


def grid(delta: Tensor, offset: Tensor, n: float, preserve_zero: bool, clamped: bool, pow2_scale: bool, rounding: str):
    """Returns the scale, the zero point (0 where zero is not preserved) and the real offset added at the end."""
    if clamped and preserve_zero:
        high = torch.clamp(offset + delta, min=0.0)
        offset = torch.clamp(offset, max=0.0)
        delta = torch.where(delta > 0, high - offset, delta)
    scale = delta / n
    if pow2_scale:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    if not preserve_zero:
        return scale, torch.zeros_like(scale), offset
    zero_point = round_to(-offset / scale, rounding)
    return scale, torch.clamp(zero_point, 0.0, n) if clamped else zero_point, torch.zeros_like(offset)


def forward(
    x: Tensor,
    delta: Tensor,
    offset: Tensor,
    n: float,
    preserve_zero: bool,
    clamped: bool,
    pow2_scale: bool,
    axis: int | None,
    rounding: str,
    noise: Tensor | None,
) -> Tensor:
    """Returns the quantized tensor; a channel whose range is a point passes unchanged."""
    # `stochastic` rounds the values; the zero point is one number a channel and stays deterministic.
    fixed = "half_even" if rounding == "stochastic" else rounding
    delta, offset = torch.broadcast_tensors(delta.reshape(-1), offset.reshape(-1))
    s, z, shift = (along(p, x, axis) for p in grid(delta, offset, n, preserve_zero, clamped, pow2_scale, fixed))
    v = (wide(x) - shift) / s + z
    if noise is not None and rounding != "stochastic":
        v = v + (noise - 0.5)
    q = round_to(torch.clamp(v, 0.0, n), rounding, noise)
    y = (q - z) * s + shift
    return like(torch.where(along(delta, x, axis) > 0, y.to(x.dtype), x), x)


def backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor,
    offset: Tensor,
    n: float,
    preserve_zero: bool,
    clamped: bool,
    pow2_scale: bool,
    axis: int | None,
    rounding: str,
) -> Tensor:
    """Returns the gradient where the code before rounding lies in [0, n]."""
    fixed = "half_even" if rounding == "stochastic" else rounding
    delta, offset = torch.broadcast_tensors(delta.reshape(-1), offset.reshape(-1))
    s, z, shift = (along(p, x, axis) for p in grid(delta, offset, n, preserve_zero, clamped, pow2_scale, fixed))
    v = (wide(x) - shift) / s + z
    inside = (v >= 0) & (v <= n)
    return like(torch.where(inside | (along(delta, x, axis) <= 0), grad, 0), x)
