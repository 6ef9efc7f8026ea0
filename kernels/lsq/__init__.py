"""Learned step size quantization (LSQ, LSQ+): the scale is trained, and optionally the offset."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable, first_order_only
from . import reference

_GRID = (
    "Tensor scale, Tensor? offset, float qmin, float qmax, Tensor? limits, int? axis, str rounding, float grad_scale"
)


def _fake_backward(grad, x, scale, offset, *_):
    return (
        torch.empty_like(x),
        torch.empty_like(scale),
        scale.new_empty(0) if offset is None else torch.empty_like(offset),
    )


define(f"lsq(Tensor x, {_GRID}) -> Tensor", reference.forward, lambda x, *_: torch.empty_like(x))
define(f"lsq_backward(Tensor grad, Tensor x, {_GRID}) -> (Tensor, Tensor, Tensor)", reference.backward, _fake_backward)


def _save(ctx, inputs, output):
    x, scale, offset, ctx.qmin, ctx.qmax, limits, ctx.axis, ctx.rounding, ctx.grad_scale = inputs
    ctx.save_for_backward(x, scale, offset, limits)


def _backward(ctx, grad):
    x, scale, offset, limits = ctx.saved_tensors
    dx, dscale, doffset = _run_backward(
        grad, x, scale, offset, ctx.qmin, ctx.qmax, limits, ctx.axis, ctx.rounding, ctx.grad_scale
    )
    return dx, dscale, None if offset is None else doffset, None, None, None, None, None, None


_run = differentiable("lsq", _save, _backward)
_run_backward = first_order_only("lsq_backward")


def lsq(
    x: Tensor,
    scale: Tensor,
    qmin: float | Tensor,
    qmax: float | Tensor,
    *,
    axis: int | None = None,
    grad_scale: float = 1.0,
    offset: Tensor | None = None,
    rounding: str = "half_even",
) -> Tensor:
    """Returns `round(clip((x - offset) / scale, qmin, qmax)) * scale + offset`, differentiable in all three tensors.

    With `v = (x - offset) / scale`: inside (`qmin < v < qmax`, strictly) `dx = g`, `dscale = g (round(v) - v)`,
    `doffset = 0`; outside `dx = 0`, `dscale = g qmin` or `g qmax`, `doffset = g`. Scale and offset gradients are summed
    and multiplied by `grad_scale`. Computed in float32 (float64 for a
    float64 `x`); NaN stays NaN, infinities saturate.

    Args:
        x: Any shape and layout.
        scale: > 0, one element or one per channel.
        qmin: Lowest code (`-QN`); a tensor where channels differ in bits.
        qmax: Highest code (`QP`).
        axis: The channel axis of `x`; None = the whole tensor.
        grad_scale: LSQ's `1 / sqrt(numel * QP)`.
        offset: LSQ+'s real-valued offset, one element or one per channel.
        rounding: See `round_to`; not `stochastic`.

    Source: Esser et al. 2019, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576.
    """
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: 'stochastic' has no learned-step gradient, expected a deterministic mode")
    scale = check.parameter("scale", scale, x, axis, positive=True)
    offset = None if offset is None else check.parameter("offset", offset, x, axis)
    grid = check.limits(qmin, qmax, x, axis)
    return _run(x, scale, offset, *grid, axis, rounding, float(grad_scale))
