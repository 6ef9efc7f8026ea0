"""Quantization to the nearest entry of a table: powers of two, sums of them, k-means codebooks."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable, first_order_only
from . import reference

_GRID = "Tensor levels, Tensor scale, int? axis, bool clip_gradient"

define(f"level_grid(Tensor x, {_GRID}) -> Tensor", reference.forward, lambda x, *_: torch.empty_like(x))
define(
    f"level_grid_backward(Tensor grad, Tensor x, {_GRID}) -> (Tensor, Tensor)",
    reference.backward,
    lambda grad, x, levels, scale, *_: (torch.empty_like(x), torch.empty_like(scale)),
)


def _save(ctx, inputs, output):
    x, levels, scale, ctx.axis, ctx.clip_gradient = inputs
    ctx.save_for_backward(x, levels, scale)


def _backward(ctx, grad):
    dx, dscale = _run_backward(grad, *ctx.saved_tensors, ctx.axis, ctx.clip_gradient)
    return dx, None, dscale, None, None


_run = differentiable("level_grid", _save, _backward)
_run_backward = first_order_only("level_grid_backward")


def level_grid(
    x: Tensor, levels: Tensor, scale: Tensor, *, axis: int | None = None, clip_gradient: bool = True
) -> Tensor:
    """Returns `scale * (the level nearest to x / scale)`.

    Half-way values go to the level of smaller magnitude; between `-a` and `a` to `a`. NaN stays NaN, infinities
    saturate. With `v = x / scale`: `dx = g` where `levels[0] <= v <= levels[-1]` (everywhere without `clip_gradient`),
    `dscale = sum g (level - v)` inside, `sum g level` outside.

    Args:
        x: Any shape and layout.
        levels: Sorted, finite, [L] with L >= 1, the same for all channels.
        scale: > 0, one element or one per channel.
        axis: The channel axis of `x`; None = the whole tensor.
        clip_gradient: Stop the gradient of `x` outside the levels.

    Source: Li et al. 2020, arXiv 1909.13144 (eq. 6 for the gradient of the clip value).
    """
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    scale = check.parameter("scale", scale, x, axis, positive=True)
    if levels.device != x.device:
        raise KernelError(f"levels: is on {levels.device}, but x is on {x.device}")
    if levels.dim() != 1 or levels.numel() == 0:
        raise KernelError(f"levels: got shape {tuple(levels.shape)}, expected [L] with L >= 1")
    levels = levels.detach().to(check.precision(x, levels))
    looked_at = levels.device.type == "cpu" and not torch.compiler.is_compiling() and type(levels) is Tensor
    if looked_at and not (levels.isfinite().all() and (levels[1:] >= levels[:-1]).all()):
        raise KernelError("levels: expected finite numbers in ascending order")
    return _run(x, levels, scale, axis, bool(clip_gradient))
