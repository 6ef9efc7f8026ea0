"""The definition of norms, vectors of length 1 and softmax, on NumPy integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qexp.integer.op import Ints, Op
from qexp.integer.program import channels
from qexp.integer.statistics import Length, Normalize, Softmax, UnitLength


def root(x: Ints) -> Ints:
    """Returns the floor of square roots.

    >>> root(np.array([0, 15, 16, 2**31 - 1, 10**12, 2**62 - 1])).tolist()
    [0, 3, 4, 46340, 1000000, 2147483647]
    """
    guess = np.floor(np.sqrt(x.astype(np.float64))).astype(np.int64)  # off by one where float64 rounds
    guess = guess - (guess * guess > x)
    return guess + ((guess + 1) * (guess + 1) <= x)


def normalize(op: Normalize, x: Ints) -> Ints:
    """Returns the codes with mean 0 and variance 1."""
    runs = x.reshape(len(x), op.groups, -1)
    n, total = runs.shape[2], runs.sum(2, keepdims=True)
    w = n * (runs * runs).sum(2, keepdims=True) - total * total
    t = root((w << (2 * op.finer)) + op.eps)
    apart = (n * runs - total) << (op.finer + op.fraction)
    y = np.where(t > 0, (2 * apart + t) // np.maximum(2 * t, 1), 0).reshape(x.shape)
    sign, bias = (channels(v, x.ndim, op.axis) for v in (op.sign, op.bias))
    return sign * y + bias


def length(op: Length, x: Ints) -> Ints:
    """Returns lengths of vectors."""
    x = x - op.zero
    return root((x * x).sum(tuple(axis + 1 for axis in op.axes), keepdims=True) << (2 * op.finer))


def unit_length(op: UnitLength, x: Ints) -> Ints:
    """Returns vectors divided by their length."""
    x = x - op.zero
    w = (x * x).sum(op.axis + 1, keepdims=True)
    t = np.maximum(root(w << (2 * op.finer)), op.least)
    return ((x << (op.finer + op.fraction + 1)) + t) // (2 * t)


def softmax(op: Softmax, x: Ints) -> Ints:
    """Returns shares of exponentials."""
    e = op.table[x.max(op.axis + 1, keepdims=True) - x]
    s = e.sum(op.axis + 1, keepdims=True)
    return ((e << (op.fraction + 1)) + s) // (2 * s)


STATISTICS: dict[type[Op], Callable[..., Ints]] = {
    Normalize: normalize,
    Length: length,
    UnitLength: unit_length,
    Softmax: softmax,
}
