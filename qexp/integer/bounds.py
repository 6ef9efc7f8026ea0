"""Bounds of a layer's partial sums, for any input codes and any order of addition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexp.integer.program import Conv, Linear

Ints = NDArray[np.int64]


def partial_sums(op: Conv | Linear, low: int, high: int) -> tuple[int, int]:
    """Returns the least and the greatest partial sum that codes between `low` and `high` can give; zero is one of them."""
    least, most = by_output(op.weight, op.zero, getattr(op, "groups", 1), low, high)
    return int(least.min(initial=0)), int(most.max(initial=0))


def greatest_pair(op: Conv | Linear) -> int:
    """Returns the greatest sum of any two neighbouring products of a layer's weights with bytes 0..255.

    Processors without dot-product instructions (x86 before VNNI) add such pairs in 16 bits, which saturate beyond 32,767.
    """
    rows = op.weight.reshape(len(op.weight), -1)
    ends = np.maximum(rows, 0), np.maximum(-rows, 0)
    return int(max((255 * np.sort(end, axis=1)[:, -2:].sum(1).max(initial=0) for end in ends), default=0))


def by_output(weight: Ints, zero: Ints, groups: int, low: int, high: int) -> tuple[Ints, Ints]:
    """Returns the least and the greatest partial sum of each output, `[O]` and `[O]`.

    Args:
        weight: [O, I / groups, ...].
        zero: Zero point of the input, one number or one per channel.
        groups: Groups of the convolution.
        low, high: Least and greatest code of the input.
    """
    outputs, per = weight.shape[:2]
    zero = np.broadcast_to(zero, (per * groups,)).reshape(groups, per)
    spread = (outputs, per, *[1] * (weight.ndim - 2))
    ends = [np.repeat(end - zero, outputs // groups, axis=0).reshape(spread) for end in (low, high)]
    ends = np.minimum(ends[0], 0), np.maximum(ends[1], 0)  # beyond the border an input is zero
    axes = tuple(range(1, weight.ndim))
    products = weight * ends[0], weight * ends[1]
    return np.minimum(*products).sum(axes), np.maximum(*products).sum(axes)
