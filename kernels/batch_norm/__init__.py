"""Batch normalisation of a training step, with a residual sum and a clamp (a ReLU) after it, in few passes over memory."""

import math

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..layout import wide_type
from ..library import define, differentiable, first_order_only
from . import reference


def _fake(x, weight, *_):
    moments = weight.new_empty(weight.shape, dtype=wide_type(x))
    return torch.empty_like(x), moments, torch.empty_like(moments)


def _fake_backward(grad, more, x, y, weight, *rest):
    dadded = torch.empty_like(x) if rest[-1] else x.new_empty(0)
    return torch.empty_like(x), dadded, torch.empty_like(weight), torch.empty_like(weight)


define(
    "batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor? added, float eps, float low, float high)"
    " -> (Tensor, Tensor, Tensor)",
    reference.forward,
    _fake,
)
define(
    "batch_norm_backward(Tensor grad, Tensor? more, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor variance, float eps, float low, float high, bool added) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.backward,
    _fake_backward,
)


def _save(ctx, inputs, output):
    x, weight, bias, added, ctx.eps, ctx.low, ctx.high = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    ctx.added = added is not None
    limited = (ctx.low, ctx.high) != (-math.inf, math.inf)
    ctx.save_for_backward(x, y if ctx.added and limited else None, weight, bias, mean, variance)


def _backward(ctx, grad, _mean=None, _variance=None, more=None):
    if grad is None:
        grad, more = more, None
    if grad is None:
        return (None,) * 7
    x, y, *parameters = ctx.saved_tensors
    passes = ctx.added and y is None and more is None  # what was added gets the gradient as it is
    dx, dadded, dweight, dbias = _run_backward(
        grad, more, x, y, *parameters, ctx.eps, ctx.low, ctx.high, ctx.added and not passes
    )
    return dx, dweight, dbias, grad if passes else dadded if ctx.added else None, None, None, None


_run = differentiable("batch_norm", _save, _backward, twice=True)
_run_backward = first_order_only("batch_norm_backward")


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    added: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `y = clip((x - mean) / sqrt(variance + eps) * weight + bias + added, low, high)`, mean, variance, and `y` again.

    The mean and the variance (divided by the number of elements) are those of each channel in this batch. `y` is
    differentiable in `x`, `weight`, `bias` and `added`: where it is at a limit or beyond, no gradient flows. Computed in
    float32 (float64 for a float64 `x`), sums in float64, and rounded once to the dtype of `x`. The last result is the first
    with a gradient of its own: where `y` has two readers and one takes it, their gradients need no pass to be added up.

    Args:
        x: `[N, C, ...]`, any layout.
        weight, bias: `[C]`.
        eps: Added to the variance.
        added: Shape and dtype of `x`.
        low, high: 0 and infinity for a ReLU.

    Source: Ioffe, Szegedy 2015, arXiv 1502.03167, algorithm 1.
    """
    check.tensor("x", x)
    if x.dim() < 2:
        raise KernelError(f"x: got {x.dim()} dimensions, expected [N, C, ...]")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != x.shape[1:2]:
            raise KernelError(f"{name}: got shape {list(p.shape)}, expected [{x.shape[1]}], one per channel of x")
        if p.device != x.device:
            raise KernelError(f"{name}: is on {p.device}, but x is on {x.device}")
    if added is not None and (added.shape != x.shape or added.dtype != x.dtype):
        raise KernelError(
            f"added: got {list(added.shape)} of {added.dtype}, expected {list(x.shape)} of {x.dtype}, as x is"
        )
    if x.numel() <= x.shape[1]:
        raise KernelError(f"x: got shape {list(x.shape)}, expected more than one value per channel")
    if not low < high:
        raise KernelError(f"low, high: got {low} and {high}, expected low < high")
    return _run(x, weight, bias, added, float(eps), float(low), float(high))
