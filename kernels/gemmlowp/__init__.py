"""The GEMMLOWP affine quantizer: shift, scale, zero point, noise, clip and rounding in one pass over the tensor."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..fake_quantize import refuse_beyond_int32
from ..library import constant, define, differentiable, first_order_only
from . import reference

_GRID = "Tensor scale, Tensor zero_point, Tensor shift, float qmin, float qmax, Tensor? limits, int? axis"
NOISES = ("none", "uniform")

define(
    f"gemmlowp(Tensor x, {_GRID}, str rounding, Tensor? noise) -> Tensor",
    reference.forward,
    lambda x, *_: torch.empty_like(x),
)
define(
    f"gemmlowp_codes(Tensor x, {_GRID}, str rounding, Tensor? noise) -> Tensor",
    reference.codes,
    lambda x, *_: torch.empty_like(x, dtype=torch.int32),
)
define(
    f"gemmlowp_backward(Tensor grad, Tensor x, {_GRID}) -> Tensor",
    reference.backward,
    lambda grad, x, *_: torch.empty_like(x),
)


def _save(ctx, inputs, output):
    x, scale, zero_point, shift, ctx.qmin, ctx.qmax, limits, ctx.axis, _, _ = inputs
    ctx.save_for_backward(x, scale, zero_point, shift, limits)


def _backward(ctx, grad):
    *tensors, limits = ctx.saved_tensors
    dx = _run_backward(grad, *tensors, ctx.qmin, ctx.qmax, limits, ctx.axis)
    return dx, None, None, None, None, None, None, None, None, None


_run = differentiable("gemmlowp", _save, _backward)
_run_backward = first_order_only("gemmlowp_backward")
constant("gemmlowp_codes")


def _arguments(x, scale, zero_point, shift, qmin, qmax, axis, noise, rounding, generator) -> tuple:
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    scale = check.parameter("scale", scale, x, axis, positive=True)
    zero_point = check.parameter("zero_point", zero_point, x, axis)
    shift = check.parameter("shift", shift, x, axis)
    if noise not in NOISES:
        raise KernelError(f"noise={noise} is not allowed; use {' or '.join(NOISES)}")
    if noise == "uniform" and rounding == "stochastic":
        raise KernelError("noise=uniform and rounding=stochastic add noise twice; choose one")
    check.rounding(rounding)
    drawn = check.noise(rounding if noise == "none" else "stochastic", x, generator)
    return (x, scale, zero_point, shift, *check.limits(qmin, qmax, x, axis), axis, rounding, drawn)


def gemmlowp(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    shift: Tensor,
    qmin: float | Tensor,
    qmax: float | Tensor,
    *,
    axis: int | None = None,
    noise: str = "none",
    rounding: str = "half_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns `(round(clip((x - shift) / scale + zero_point, qmin, qmax)) - zero_point) * scale + shift`.

    Where zero has a code the shift is 0; where it has none the zero point is 0 and the shift is the lower end of the range. Computed
    in float32 (float64 for a float64 `x`), returned in the dtype and layout of `x`. The gradient goes to `x` only: 1 where the code
    before noise and rounding lies within the limits.

    Args:
        x: Any shape and layout.
        scale: Step between two codes, > 0, one element or one per channel.
        zero_point: The code of the shift, one element or one per channel.
        shift: Subtracted first and added last, one element or one per channel.
        qmin: Lowest code; a tensor where channels differ in bits.
        qmax: Highest code.
        axis: The channel axis of `x`; None = the whole tensor.
        noise: `uniform` adds U(-1/2, 1/2) to the code before the clip.
        rounding: See `round_to`; `stochastic` and `noise="uniform"` exclude each other.
        generator: Source of the noise.

    Source: Banner et al. 2019, arXiv 1810.05723 (code); Jacob et al. 2018, arXiv 1712.05877.
    """
    return _run(*_arguments(x, scale, zero_point, shift, qmin, qmax, axis, noise, rounding, generator))


def gemmlowp_codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    shift: Tensor,
    qmin: float | Tensor,
    qmax: float | Tensor,
    *,
    axis: int | None = None,
    noise: str = "none",
    rounding: str = "half_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the codes of `gemmlowp` as int32; NaN becomes -2**31. There is no gradient."""
    refuse_beyond_int32(qmin, qmax)
    arguments = _arguments(x, scale, zero_point, shift, qmin, qmax, axis, noise, rounding, generator)
    return torch.ops.qexp.gemmlowp_codes(*arguments)
