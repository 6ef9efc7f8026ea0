"""Broadcasts the parameters of a quantizer (one element, or one per channel) to their tensor."""

import torch
from torch import Tensor


def wide_type(x: Tensor) -> torch.dtype:
    """Returns the dtype for computing with `x`: float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Returns `x` in the dtype for computing with it."""
    return x.to(wide_type(x))


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Returns `parameter` shaped to broadcast with `x`: [] for one element, [1, C, 1, 1] for one per channel."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def limits_along(qmin: float, qmax: float, limits: Tensor | None, x: Tensor, axis: int | None):
    """Returns the lowest and the highest code, as numbers or as tensors that broadcast with `x`."""
    if limits is None:
        return qmin, qmax
    return along(limits[0], x, axis), along(limits[1], x, axis)


def sum_like(values: Tensor, parameter: Tensor, axis: int | None) -> Tensor:
    """Returns the sum of `values`, over all elements that share an element of `parameter`, in the shape of `parameter`."""
    if parameter.numel() == 1:
        return values.sum().reshape(parameter.shape).to(parameter.dtype)
    others = [d for d in range(values.dim()) if d != axis]
    summed = values.sum(others) if others else values  # torch would sum an empty list over all dimensions
    return summed.reshape(parameter.shape).to(parameter.dtype)


def valid(scale: Tensor) -> Tensor:
    """Returns `scale` with NaN where it is zero, negative or not finite: so that a wrong scale never gives a number."""
    return torch.where((scale > 0) & (scale < torch.inf), scale, torch.nan)


def like(result: Tensor, x: Tensor) -> Tensor:
    """Returns `result` in the dtype and the memory layout that `torch.empty_like(x)` has."""
    out = torch.empty_like(x)
    if result.dtype == out.dtype and result.stride() == out.stride():
        return result
    return out.copy_(result)
