"""Quantization with a learned clip value: PACT (one-sided) and mPACT (two-sided)."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable, first_order_only
from . import reference

define(
    "pact(Tensor x, Tensor alpha, float levels, bool two_sided, int? axis, str rounding) -> Tensor",
    reference.forward,
    lambda x, *_: torch.empty_like(x),
)
define(
    "pact_backward(Tensor grad, Tensor x, Tensor alpha, bool two_sided, int? axis) -> (Tensor, Tensor)",
    reference.backward,
    lambda grad, x, alpha, *_: (torch.empty_like(x), torch.empty_like(alpha)),
)


def _save(ctx, inputs, output):
    x, alpha, _, ctx.two_sided, ctx.axis, _ = inputs
    ctx.save_for_backward(x, alpha)


def _backward(ctx, grad):
    dx, dalpha = _run_backward(grad, *ctx.saved_tensors, ctx.two_sided, ctx.axis)
    return dx, dalpha, None, None, None, None


_run = differentiable("pact", _save, _backward)
_run_backward = first_order_only("pact_backward")


def _call(x, alpha, levels, two_sided, axis, rounding) -> Tensor:
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: 'stochastic' is not supported here, expected a deterministic mode")
    alpha = check.parameter("alpha", alpha, x, axis, positive=not two_sided)
    return _run(x, alpha, check.levels("levels", levels), two_sided, axis, rounding)


def pact(x: Tensor, alpha: Tensor, levels: int, *, axis: int | None = None, rounding: str = "half_even") -> Tensor:
    """Returns `x` clipped to [0, alpha] and rounded to steps of `alpha / levels`.

    `y = round(clip(x / s, 0, levels)) s` with `s = alpha / levels`: the same codes as an export with that scale.
    `dx = g 1[0 <= x <= alpha]`, `dalpha = sum g 1[x >= alpha]`. NaN stays NaN and passes no gradient.

    Args:
        x: Any shape and layout.
        alpha: The learned clip value, > 0, one element (or one per channel).
        levels: Number of steps, `2**bits - 1`.
        axis: The channel axis where `alpha` has one element per channel.
        rounding: See `round_to`; not `stochastic`.

    Source: Choi et al. 2018, arXiv 1805.06085.
    """
    return _call(x, alpha, levels, False, axis, rounding)


def mpact(x: Tensor, alpha: Tensor, levels: int, *, axis: int | None = None, rounding: str = "half_even") -> Tensor:
    """Returns `x` clipped to [-|alpha|, |alpha|] and rounded to steps of `|alpha| / levels`.

    `dx = g 1[|x| <= |alpha|]`, `dalpha = sign(alpha) sum g (1[x >= |alpha|] - 1[x <= -|alpha|])`. A clip value of
    zero gives NaN. The arguments are those of `pact`, with `levels = 2**(bits-1) - 1`.
    """
    return _call(x, alpha, levels, True, axis, rounding)
