"""DoReFa's weight transform: tanh, divided by its largest magnitude, rounded."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..layout import wide_type
from ..library import define, differentiable, first_order_only
from . import reference


def _fake(w, *_):
    t = torch.empty_like(w, dtype=wide_type(w))
    return torch.empty_like(w), t, t.new_empty(())


define(
    "dorefa_weight(Tensor w, float levels, bool symmetric, bool rescale, str rounding) -> (Tensor, Tensor, Tensor)",
    reference.forward,
    _fake,
)
define(
    "dorefa_weight_backward(Tensor grad, Tensor y, Tensor t, Tensor peak, bool rescale) -> Tensor",
    reference.backward,
    lambda grad, *_: torch.empty_like(grad),
)


def _save(ctx, inputs, output):
    ctx.rescale = inputs[3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output)


def _backward(ctx, grad, *_):
    return _run_backward(grad, *ctx.saved_tensors, ctx.rescale), None, None, None, None


_run = differentiable("dorefa_weight", _save, _backward)
_run_backward = first_order_only("dorefa_weight_backward")


def dorefa_weight(
    w: Tensor, levels: int, symmetric: bool = False, *, rescale: bool = False, rounding: str = "half_even"
) -> Tensor:
    """Returns DoReFa's quantized weights, in [-1, 1], or (`rescale`) multiplied by `max|tanh(w)|`.

    With `t = tanh(w) / max|tanh(w)|`: `2 round((t/2 + 1/2) n) / n - 1`, which has `n + 1` levels and no zero, or
    (`symmetric`) `round(t n) / n`, which has `2 n + 1` levels, zero among them. The gradient is the true one through
    tanh and max, also if the result is multiplied by it (weights that share the maximum share its gradient), straight
    through the rounding. All-zero weights count as `t = 0` and get no gradient.

    Args:
        w: The weights, any shape.
        levels: `n`: `2**bits - 1`, symmetric `2**(bits-1) - 1`.
        symmetric: Zero is a level.
        rescale: Restore the magnitude.
        rounding: See `round_to`; not `stochastic`.

    Source: Zhou et al. 2016, arXiv 1606.06160, eq. 9.
    """
    return dorefa_weight_and_peak(w, levels, symmetric, rescale=rescale, rounding=rounding)[0]


def dorefa_weight_and_peak(
    w: Tensor, levels: int, symmetric: bool = False, *, rescale: bool = False, rounding: str = "half_even"
) -> tuple[Tensor, Tensor]:
    """Returns the result of `dorefa_weight`, and `max|tanh(w)|` without a gradient (float32, or float64 for float64 weights)."""
    check.tensor("w", w)
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: 'stochastic' is not supported here, expected a deterministic mode")
    levels = check.levels("levels", levels)
    y, _, peak = _run(w, levels, bool(symmetric), bool(rescale), rounding)
    return y, peak
