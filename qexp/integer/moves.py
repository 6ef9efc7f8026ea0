"""Operations that move codes without changing one; dimensions are counted without the batch.

`moved` describes most of them in one form, which executors and exporters share: each dimension of the result walks through one
dimension of the source by a fixed step, and what lies outside the source is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qexp.integer.op import Ints, Op


@dataclass(frozen=True, kw_only=True)
class Concat(Op):
    """Operands side by side along a dimension."""

    kind = "concat"
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Flatten(Op):
    """[N, C, H, W] -> [N, C * H * W]."""

    kind = "flatten"


@dataclass(frozen=True, kw_only=True)
class StridedPad(Op):
    """Every `stride`-th pixel, and channels of `zero` before and behind."""

    kind = "strided_pad"
    stride: int
    before: int
    after: int
    zero: Ints


@dataclass(frozen=True, kw_only=True)
class Reshape(Op):
    """The same codes in the same order in another shape, which the tensor `output` has."""

    kind = "reshape"
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Permute(Op):
    """Dimension k of the result is dimension `order[k]` of the source."""

    kind = "permute"
    order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slice(Op):
    """Every `step`-th entry from `start` on, `count` of them, along one dimension."""

    kind = "slice"
    axis: int
    start: int
    step: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Codes `value` before and behind each dimension."""

    kind = "pad"
    before: tuple[int, ...]
    after: tuple[int, ...]
    value: int


@dataclass(frozen=True)
class Walked:
    """One dimension of a result: position i is taken from `first + step * i` of a source dimension with `size` entries."""

    length: int
    first: int
    step: int
    size: int
    stride: int


def moved(op: Permute | Slice | Pad, source: tuple[int, ...]) -> list[Walked]:
    """Returns how each dimension of a result walks through the source's memory, whose shape is `source`."""
    strides = [math.prod(source[k + 1 :]) for k in range(len(source))]
    whole = [Walked(n, 0, 1, n, stride) for n, stride in zip(source, strides)]
    if isinstance(op, Permute):
        return [whole[k] for k in op.order]
    if isinstance(op, Slice):
        whole[op.axis] = Walked(op.count, op.start, op.step, source[op.axis], strides[op.axis])
        return whole
    padded = zip(source, strides, op.before, op.after)
    return [Walked(n + before + after, -before, 1, n, stride) for n, stride, before, after in padded]
