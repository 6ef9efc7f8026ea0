"""Uniform quantization in plain PyTorch: the reference for every other implementation."""

import torch
from torch import Tensor

from ..layout import along, like, limits_along, valid, wide
from ..round_to.reference import round_to

NO_CODE = torch.iinfo(torch.int32).min


def as_codes(q: Tensor, x: Tensor) -> Tensor:
    """Returns whole numbers as int32, laid out as `x`; larger ones saturate (2^31 - 1 is not a float32), NaN becomes the smallest."""
    limited = torch.where(q.isnan(), NO_CODE, q.double()).clamp(NO_CODE, torch.iinfo(torch.int32).max).to(torch.int32)
    out = torch.empty_like(x, dtype=torch.int32)
    return limited if limited.stride() == out.stride() else out.copy_(limited)


def codes(x, scale, zero_point, qmin, qmax, limits, axis, rounding, noise) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the codes (float32), the scale and the zero point, the last two shaped to broadcast with `x`."""
    s, z = along(valid(scale), x, axis), along(zero_point, x, axis)
    low, high = limits_along(qmin, qmax, limits, x, axis)
    return round_to(torch.clamp(wide(x) / s + z, low, high), rounding, noise), s, z


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
    noise: Tensor | None,
) -> Tensor:
    """Returns `(codes - zero_point) * scale`."""
    q, s, z = codes(x, scale, zero_point, qmin, qmax, limits, axis, rounding, noise)
    return like((q - z) * s, x)


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
    """Returns the gradient where `x / scale + zero_point` lies within the codes, 0 elsewhere."""
    v = wide(x) / along(valid(scale), x, axis) + along(zero_point, x, axis)
    low, high = limits_along(qmin, qmax, limits, x, axis)
    return like(torch.where((v >= low) & (v <= high), grad, 0), x)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    limits: Tensor | None,
    axis: int | None,
    rounding: str,
    noise: Tensor | None,
) -> Tensor:
    """Returns the codes as int32; NaN becomes the smallest int32."""
    q, _, _ = codes(x, scale, zero_point, qmin, qmax, limits, axis, rounding, noise)
    return as_codes(q, x)
