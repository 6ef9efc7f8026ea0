"""Uniform quantization with a scale and a zero point: simulated (`fake_quantize`) and as codes (`quantize`)."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import constant, define, differentiable, first_order_only
from . import reference

_GRID = "Tensor scale, Tensor zero_point, float qmin, float qmax, Tensor? limits, int? axis"

define(
    f"fake_quantize(Tensor x, {_GRID}, str rounding, Tensor? noise) -> Tensor",
    reference.forward,
    lambda x, *_: torch.empty_like(x),
)
define(
    f"fake_quantize_backward(Tensor grad, Tensor x, {_GRID}) -> Tensor",
    reference.backward,
    lambda grad, x, *_: torch.empty_like(x),
)
define(
    f"quantize(Tensor x, {_GRID}, str rounding, Tensor? noise) -> Tensor",
    reference.quantize,
    lambda x, *_: torch.empty_like(x, dtype=torch.int32),
)


def _save(ctx, inputs, output):
    x, scale, zero_point, ctx.qmin, ctx.qmax, limits, ctx.axis, _, _ = inputs
    ctx.save_for_backward(x, scale, zero_point, limits)


def _backward(ctx, grad):
    x, scale, zero_point, limits = ctx.saved_tensors
    dx = _run_backward(grad, x, scale, zero_point, ctx.qmin, ctx.qmax, limits, ctx.axis)
    return dx, None, None, None, None, None, None, None, None


_run = differentiable("fake_quantize", _save, _backward)
_run_backward = first_order_only("fake_quantize_backward")
constant("quantize")


def _arguments(x, scale, zero_point, qmin, qmax, axis, rounding, generator) -> tuple:
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    scale = check.parameter("scale", scale, x, axis, positive=True)
    zero_point = check.parameter("zero_point", zero_point, x, axis)
    noise = check.noise(rounding, x, generator)
    return (x, scale, zero_point, *check.limits(qmin, qmax, x, axis), axis, rounding, noise)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float | Tensor,
    qmax: float | Tensor,
    *,
    axis: int | None = None,
    rounding: str = "half_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns `x` on the grid: `(round(clip(x / scale + zero_point, qmin, qmax)) - zero_point) * scale`.

    Computed in float32 (float64 for a float64 `x`), returned in the dtype and layout of `x`. NaN stays NaN, infinities
    saturate. The gradient goes to `x` only: 1 where `qmin <= x / scale + zero_point <= qmax`, else 0 (clamp, then
    round).

    Args:
        x: Any shape and layout.
        scale: Step between two codes, > 0, one element or one per channel.
        zero_point: The code of zero, one element or one per channel.
        qmin: Lowest code; a tensor where channels differ in bits.
        qmax: Highest code.
        axis: The channel axis of `x`; None = the whole tensor.
        rounding: See `round_to`.
        generator: Source of the random numbers of `stochastic`.

    Raises:
        KernelError: An argument does not fit `x`, or (checked on the CPU only) a scale is not positive and finite. On
            a CUDA device such a scale gives NaN.
    """
    return _run(*_arguments(x, scale, zero_point, qmin, qmax, axis, rounding, generator))


def refuse_beyond_int32(qmin: float | Tensor, qmax: float | Tensor) -> None:
    """Raises for limits that int32 cannot hold (and for -2**31, the code of NaN)."""
    for name, limit in (("qmin", qmin), ("qmax", qmax)):
        if not isinstance(limit, Tensor) and abs(limit) >= 2**31:
            raise KernelError(f"{name}: got {limit}, expected a code that int32 can hold")


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float | Tensor,
    qmax: float | Tensor,
    *,
    axis: int | None = None,
    rounding: str = "half_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the codes `round(clip(x / scale + zero_point, qmin, qmax))` as int32; NaN becomes -2**31.

    Args and errors are those of `fake_quantize`; there is no gradient.
    """
    refuse_beyond_int32(qmin, qmax)
    return torch.ops.qexp.quantize(*_arguments(x, scale, zero_point, qmin, qmax, axis, rounding, generator))
