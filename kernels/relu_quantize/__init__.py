"""ReLU and uniform quantization in one pass over the tensor."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable, first_order_only
from . import reference

_GRID = "Tensor scale, Tensor zero_point, float qmin, float qmax, Tensor? limits, int? axis"

define(
    f"relu_quantize(Tensor x, {_GRID}, str rounding) -> Tensor",
    reference.forward,
    lambda x, *_: torch.empty_like(x),
)
define(
    f"relu_quantize_backward(Tensor grad, Tensor x, {_GRID}) -> Tensor",
    reference.backward,
    lambda grad, x, *_: torch.empty_like(x),
)


def _save(ctx, inputs, output):
    x, scale, zero_point, ctx.qmin, ctx.qmax, limits, ctx.axis, _ = inputs
    ctx.save_for_backward(x, scale, zero_point, limits)


def _backward(ctx, grad):
    x, scale, zero_point, limits = ctx.saved_tensors
    dx = torch.ops.qexp.relu_quantize_backward(grad, x, scale, zero_point, ctx.qmin, ctx.qmax, limits, ctx.axis)
    return dx, None, None, None, None, None, None, None


differentiable("relu_quantize", _save, _backward)
first_order_only("relu_quantize_backward")


def relu_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float | Tensor,
    qmax: float | Tensor,
    *,
    axis: int | None = None,
    rounding: str = "half_even",
) -> Tensor:
    """Returns `fake_quantize(relu(x), ...)` without storing `relu(x)`.

    The gradient is that of the two steps: 1 where `x > 0` and the code lies within the limits. Arguments and errors
    are those of `fake_quantize`. (LSQ and PACT with unsigned codes need no such fusion: they give the same codes with
    and without the ReLU before them.)
    """
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: 'stochastic' is not offered here, expected a deterministic mode")
    scale = check.parameter("scale", scale, x, axis, positive=True)
    zero_point = check.parameter("zero_point", zero_point, x, axis)
    grid = check.limits(qmin, qmax, x, axis)
    return torch.ops.qexp.relu_quantize(x, scale, zero_point, *grid, axis, rounding)
