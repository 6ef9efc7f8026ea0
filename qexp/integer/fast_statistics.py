"""The functions of a fast executor for norms, vectors of length 1 and softmax: 64-bit integers of torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qexp.integer.machine import Machine
from qexp.integer.op import Op
from qexp.integer.statistics import Length, Normalize, Softmax, UnitLength


def root(x: Tensor) -> Tensor:
    """Returns the floor of square roots of int64.

    >>> root(torch.tensor([0, 15, 16, 10**12])).tolist()
    [0, 3, 4, 1000000]
    """
    guess = x.double().sqrt().floor().long()  # off by one where float64 rounds
    guess = guess - (guess * guess > x).long()
    return guess + ((guess + 1) * (guess + 1) <= x).long()


def normalized(op: Normalize, x: Tensor, sign: Tensor, bias: Tensor) -> Tensor:
    """Returns codes with mean 0 and variance 1, int64."""
    runs = x.long().reshape(len(x), op.groups, -1)
    n, total = runs.shape[2], runs.sum(2, keepdim=True)
    w = n * (runs * runs).sum(2, keepdim=True) - total * total
    t = root((w << (2 * op.finer)) + op.eps)
    apart = (n * runs - total) << (op.finer + op.fraction)
    y = torch.div(2 * apart + t, (2 * t).clamp_min(1), rounding_mode="floor") * (t > 0)
    return sign * y.reshape(x.shape) + bias


def lengths(op: Length, x: Tensor) -> Tensor:
    """Returns lengths of vectors, int64."""
    x = x.long() - int(op.zero[0])
    return root((x * x).sum([axis + 1 for axis in op.axes], keepdim=True) << (2 * op.finer))


def divided(op: UnitLength, x: Tensor) -> Tensor:
    """Returns vectors divided by their length, int64."""
    x = x.long() - int(op.zero[0])
    w = (x * x).sum(op.axis + 1, keepdim=True)
    t = root(w << (2 * op.finer)).clamp_min(op.least)
    return torch.div((x << (op.finer + op.fraction + 1)) + t, 2 * t, rounding_mode="floor")


def shares(op: Softmax, x: Tensor, table: Tensor) -> Tensor:
    """Returns shares of exponentials, int64."""
    x = x.long()
    e = table[x.amax(op.axis + 1, keepdim=True) - x]
    s = e.sum(op.axis + 1, keepdim=True)
    return ((e << (op.fraction + 1)) + s) // (2 * s)


def _normalize(fast: Machine, op: Normalize) -> Callable[..., Tensor]:
    dtype, ndim = fast.exact(op.output), fast.ndim(op.output)
    sign, bias = (fast.constant(v, torch.int64, ndim, op.axis) for v in (op.sign, op.bias))
    return lambda x: normalized(op, x, sign, bias).to(dtype)


def _length(fast: Machine, op: Length) -> Callable[..., Tensor]:
    dtype = fast.exact(op.output)
    return lambda x: lengths(op, x).to(dtype)


def _unit_length(fast: Machine, op: UnitLength) -> Callable[..., Tensor]:
    dtype = fast.exact(op.output)
    return lambda x: divided(op, x).to(dtype)


def _softmax(fast: Machine, op: Softmax) -> Callable[..., Tensor]:
    dtype, table = fast.exact(op.output), torch.from_numpy(op.table.copy()).to(fast.device)
    return lambda x: shares(op, x, table).to(dtype)


STATISTICS: dict[type[Op], Callable[[Machine, Op], Callable[..., Tensor]]] = {
    Normalize: _normalize,
    Length: _length,
    UnitLength: _unit_length,
    Softmax: _softmax,
}
