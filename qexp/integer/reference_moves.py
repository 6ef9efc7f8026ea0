"""The definition of operations that only move codes, on NumPy integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.op import Ints, Op


def concat(op: Concat, *xs: Ints) -> Ints:
    """Returns operands side by side."""
    return np.concatenate(xs, axis=op.axis + 1)


def flatten(op: Flatten, x: Ints) -> Ints:
    """Returns maps as features."""
    return x.reshape(len(x), -1)


def strided_pad(op: StridedPad, x: Ints) -> Ints:
    """Returns every `stride`-th pixel, and more channels."""
    x = x[:, :, :: op.stride, :: op.stride]
    return np.pad(x, ((0, 0), (op.before, op.after), (0, 0), (0, 0)), constant_values=int(op.zero[0]))


def reshape(op: Reshape, x: Ints) -> Ints:
    """Returns the codes in another shape."""
    return x.reshape(len(x), *op.shape)


def permute(op: Permute, x: Ints) -> Ints:
    """Returns the codes with dimensions in another order."""
    return x.transpose(0, *(k + 1 for k in op.order))


def cut(op: Slice, x: Ints) -> Ints:
    """Returns some entries along a dimension."""
    return x.take(op.start + op.step * np.arange(op.count), axis=op.axis + 1)


def pad(op: Pad, x: Ints) -> Ints:
    """Returns the codes with others around them."""
    return np.pad(x, ((0, 0), *zip(op.before, op.after)), constant_values=op.value)


MOVES: dict[type[Op], Callable[..., Ints]] = {
    Concat: concat,
    Flatten: flatten,
    StridedPad: strided_pad,
    Reshape: reshape,
    Permute: permute,
    Slice: cut,
    Pad: pad,
}
