"""DoReFa's weight transform: tanh, divided by its largest magnitude, rounded."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable, first_order_only
from . import reference

define(
    "dorefa_weight(Tensor w, float levels, bool symmetric, str rounding) -> Tensor",
    reference.forward,
    lambda w, *_: torch.empty_like(w),
)
define(
    "dorefa_weight_backward(Tensor grad, Tensor w) -> Tensor",
    reference.backward,
    lambda grad, w: torch.empty_like(w),
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return torch.ops.qexp.dorefa_weight_backward(grad, *ctx.saved_tensors), None, None, None


differentiable("dorefa_weight", _save, _backward)
first_order_only("dorefa_weight_backward")


def dorefa_weight(w: Tensor, levels: int, symmetric: bool = False, *, rounding: str = "half_even") -> Tensor:
    """Returns DoReFa's quantized weights, in [-1, 1].

    With `t = tanh(w) / max|tanh(w)|`: `2 round((t/2 + 1/2) n) / n - 1`, which has `n + 1` levels and no zero, or
    (`symmetric`) `round(t n) / n`, which has `2 n + 1` levels, zero among them. The gradient is the true one through
    tanh and max (weights that share the maximum share its gradient), straight through the rounding. All-zero weights
    count as `t = 0` and get no gradient.

    Args:
        w: The weights, any shape.
        levels: `n`: `2**bits - 1`, symmetric `2**(bits-1) - 1`.
        symmetric: Zero is a level.
        rounding: See `round_to`; not `stochastic`.

    Source: Zhou et al. 2016, arXiv 1606.06160, eq. 9.
    """
    check.tensor("w", w)
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: 'stochastic' is not offered here, expected a deterministic mode")
    return torch.ops.qexp.dorefa_weight(w, check.levels("levels", levels), bool(symmetric), rounding)
