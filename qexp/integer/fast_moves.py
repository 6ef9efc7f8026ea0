"""The functions of a fast executor for operations that only move codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.integer.machine import Machine
from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.op import Op


def _strided_pad(fast: Machine, op: StridedPad) -> Callable[..., Tensor]:
    around, zero = (0, 0, 0, 0, op.before, op.after), int(op.zero[0])
    offset = fast.stored(op.inputs[0]).offset

    def step(x: Tensor) -> Tensor:
        x = x[:, :, :: op.stride, :: op.stride]
        return F.pad(x, around, value=zero + offset if x.dtype is torch.uint8 else zero)

    return step


def _concat(fast: Machine, op: Concat) -> Callable[..., Tensor]:
    dtype = fast.exact(*op.inputs)
    axis = op.axis + 1
    return lambda *xs: torch.cat(xs if len({x.dtype for x in xs}) == 1 else [x.to(dtype) for x in xs], axis)


def _reshape(fast: Machine, op: Reshape) -> Callable[..., Tensor]:
    return lambda x: x.reshape(-1, *op.shape)


def _permute(fast: Machine, op: Permute) -> Callable[..., Tensor]:
    order = (0, *(k + 1 for k in op.order))
    return lambda x: x.permute(order)


def _slice(fast: Machine, op: Slice) -> Callable[..., Tensor]:
    place = (slice(None),) * (op.axis + 1)
    if op.step > 0:
        entries = slice(op.start, op.start + (op.count - 1) * op.step + 1, op.step)
        return lambda x: x[(*place, entries)]
    at = torch.arange(op.count, device=fast.device) * op.step + op.start
    return lambda x: x.index_select(op.axis + 1, at)


def _pad(fast: Machine, op: Pad) -> Callable[..., Tensor]:
    around = [n for pair in reversed([*zip(op.before, op.after)]) for n in pair]
    return lambda x: F.pad(x, around, value=op.value)


MOVES: dict[type[Op], Callable[[Machine, Op], Callable[..., Tensor]]] = {
    Concat: _concat,
    Flatten: lambda fast, op: lambda x: x.flatten(1),
    StridedPad: _strided_pad,
    Reshape: _reshape,
    Permute: _permute,
    Slice: _slice,
    Pad: _pad,
}
