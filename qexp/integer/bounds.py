"""Bounds of a layer's partial sums, for any input codes and any order of addition."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qexp.integer.program import Conv, Linear

Ints = NDArray[np.int64]
ROOM = 2**20  # weights treated at a time: those of a large linear layer fill the memory several times otherwise


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
    least, most = by_input(weight, zero, groups, low, high)
    return least.sum(1), most.sum(1)


def by_input(weight: Ints, zero: Ints, groups: int, low: int, high: int, block: int = 0) -> tuple[Ints, Ints]:
    """Returns what each block of input channels adds at least and at most to the sum of each output, `[O, blocks]` twice.

    Args:
        weight, zero, groups, low, high: See `by_output`.
        block: Channels of a block, the last one may have fewer; 0 takes all of them as one.
    """
    outputs, per = weight.shape[:2]
    block = block or max(per, 1)
    starts = np.arange(0, max(per, 1), block)
    zero = np.broadcast_to(zero, (per * groups,)).reshape(groups, per)
    below, above = np.minimum(low - zero, 0), np.maximum(high - zero, 0)  # beyond the border an input is zero
    least, most = (np.zeros((outputs, len(starts)), np.int64) for _ in range(2))
    for first in range(0, outputs, rows := max(1, ROOM // max(weight[:1].size, 1))):
        part = weight[first : first + rows].reshape(-1, per, math.prod(weight.shape[2:]))
        positive = np.maximum(part, 0).sum(2)
        negative = part.sum(2) - positive
        group = np.arange(first, first + len(part)) // (outputs // groups)
        ends = below[group], above[group]
        if per:
            least[first : first + rows] = np.add.reduceat(positive * ends[0] + negative * ends[1], starts, axis=1)
            most[first : first + rows] = np.add.reduceat(positive * ends[1] + negative * ends[0], starts, axis=1)
    return least, most
