"""Exact sums of 8-bit codes with the processor's dot products, through PyTorch's oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from qexp_kernels import compiled
from qexp_kernels.fused_conv import Products
from qexp_kernels.fused_conv import products as prepared
from qexp_kernels.fused_conv.reference import QUAD
from torch import Tensor

from qexp.integer.bounds import by_input, by_output
from qexp.integer.program import Conv, Linear

_EXACT = 2**24  # below it float32, in which the sums come back, holds every integer
_PAIR = 2**15 - 1  # greatest sum of two products that processors without dot products add exactly
_BLOCK = 16  # input channels of a part are a multiple of it
_CACHED = 2**16  # bytes of a weight that is read again for each tile
Sums = Callable[[Tensor], Tensor]


def offset(low: int) -> int:
    """Returns what is added to codes from `low` on so that they are bytes from 0 on."""
    return max(-low, 0)


def suits(op: Conv | Linear, low: int, high: int) -> bool:
    """Returns whether the sums of codes between `low` and `high` can be computed in this form exactly on this machine."""
    most, moved = int(np.abs(op.weight).max(initial=0)), high + offset(low)
    if moved > 255 or most > 127 or op.zero.size > 1:
        return False
    return exact_pairs(moved, most) and (
        _fits(op, 0, op.weight.shape[1], low, high) or _parts(op, low, high) is not None
    )


def exact_pairs(byte: int, weight: int) -> bool:
    """Returns whether this machine adds products of bytes up to `byte` and weights up to `weight` exactly."""
    return available() or (2 * byte * weight <= _PAIR and available(127))


def sums(op: Conv | Linear, low: int, high: int) -> Sums:
    """Returns the sums of a layer that `suits` as a function of bytes.

    Where a sum can pass the integers that float32 holds, the input channels are split into parts whose sums cannot, and float64 adds
    the parts.

    Returns:
        A function from bytes, codes plus `offset(low)`, to sums: float32, or float64 of parts; channels innermost.
    """
    parts = [(0, op.weight.shape[1])] if _fits(op, 0, op.weight.shape[1], low, high) else _parts(op, low, high)
    steps = [(first, last, _part(op, first, last, offset(low))) for first, last in parts or []]
    if len(steps) == 1:
        step = steps[0][2]
        return (lambda x: step(x[:, :, None, None]).flatten(1)) if isinstance(op, Linear) else step

    def added(x: Tensor) -> Tensor:
        x = x[:, :, None, None] if isinstance(op, Linear) else x
        total = None
        for first, last, step in steps:
            y = step(x[:, first:last])
            total = y.double() if total is None else total.add_(y)
        return total.flatten(1) if isinstance(op, Linear) else total

    return added


def products(op: Conv | Linear, low: int, high: int) -> Products | None:
    """Returns a layer that `suits` as `fused_conv` computes it; None where oneDNN is to compute its sums.

    These are layers whose windows are one pixel, and layers whose channels are each by itself: their sums would travel through memory
    for little work.
    """
    weight, window, groups = op.weight, ((1, 1), (0, 0), (1, 1)), 1
    if isinstance(op, Conv):
        window, groups = (op.stride, op.padding, op.dilation), op.groups
    weight = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
    alone = groups == len(weight) and weight.shape[1] == 1
    dots = groups == 1 and weight.shape[2:] == (1, 1) and not any(window[1]) and weight.shape[1] % QUAD == 0
    fast = torch.cpu._is_vnni_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (alone or (dots and fast)):
        return None
    ends = by_output(weight, op.zero, groups, low, high)
    most = max(-int(ends[0].min(initial=0)), int(ends[1].max(initial=0)))
    if most >= 2**31 or weight.shape[1] * 255 * 127 >= 2**31:
        return None
    codes = torch.from_numpy(weight.astype(np.int8))
    return prepared(codes, int(op.zero[0]) + offset(low), *window, groups, wide=most >= _EXACT)


def tiled(
    weight: Tensor,
    zero: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Products | None:
    """Returns a convolution of bytes as `fused_conv` computes it; None where oneDNN is to compute its sums.

    A tile at a time it pays where the weight stays in the cache beside the tile. Arguments are those of `through_onednn`.
    """
    alone = groups == len(weight) and weight.shape[1] == 1
    fast = torch.cpu._is_vnni_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not compiled("fused_conv") or not fast or not (alone or (groups == 1 and weight.numel() <= _CACHED)):
        return None
    return prepared(weight, zero, stride, padding, dilation, groups)


def _parts(op: Conv | Linear, low: int, high: int) -> list[tuple[int, int]] | None:
    """Returns ranges of input channels whose sums float32 holds; None if there are none."""
    inputs = op.weight.shape[1]
    if getattr(op, "groups", 1) > 1 or inputs <= _BLOCK:
        return None
    least, most = by_input(op.weight, op.zero, 1, low, high, _BLOCK)
    found, first, sums = [], 0, None
    for number, here in enumerate(zip(least.T, most.T)):
        if not _exact(*here):
            return None  # a single block is too wide
        more = here if sums is None else (sums[0] + here[0], sums[1] + here[1])
        if not _exact(*more):
            found.append((first, number * _BLOCK))
            first, more = number * _BLOCK, here
        sums = more
    return [*found, (first, inputs)]


def _fits(op: Conv | Linear, first: int, last: int, low: int, high: int) -> bool:
    return _exact(*by_output(op.weight[:, first:last], op.zero, getattr(op, "groups", 1), low, high))


def _exact(least: NDArray, most: NDArray) -> bool:
    """Whether float32 holds all whole numbers between bounds of sums."""
    return max(-int(least.min(initial=0)), int(most.max(initial=0))) < _EXACT


def _part(op: Conv | Linear, first: int, last: int, moved: int) -> Sums:
    weight = torch.from_numpy(op.weight[:, first:last].astype(np.int8))
    weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    window = (1, 1), (0, 0), (1, 1), 1
    if isinstance(op, Conv):
        window = op.stride, op.padding, op.dilation, op.groups
    return through_onednn(weight.contiguous(), int(op.zero[0]) + moved, *window)


def through_onednn(
    weight: Tensor,
    zero: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    scale: float = 1.0,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Sums:
    """Returns a function from bytes `[N, C, H, W]` to `sum (byte - zero) * weight * scale * scales + bias`, float32.

    The sum is a 32-bit integer; the rest is applied once, in float32. Beyond the border a byte is `zero`.

    Args:
        weight: int8 `[O, I / groups, kh, kw]`.
        zero: Byte of zero.
        stride, padding, dilation, groups: Of the convolution.
        scale: Value of a byte's step.
        scales: Value of a weight's step, one per output; by default 1.
        bias: One per output.
    """
    scales = torch.ones(len(weight)) if scales is None else scales
    none = torch.zeros(len(weight), dtype=torch.int32)
    window = list(stride), list(padding), list(dilation), groups
    packed: dict[
        torch.Size, Tensor
    ] = {}  # for one shape of input: a weight packed for another takes up to 20 times as long

    def step(x: Tensor) -> Tensor:
        if x.shape not in packed:
            packed.clear()
            packed[x.shape] = torch.ops.onednn.qconv_prepack(weight, scales, scale, zero, *window, list(x.shape))
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise(
            x, scale, zero, packed[x.shape], scales, none, bias, *window, 1.0, 0, torch.float32, "none", [], ""
        )

    return step


@cache
def available(most: int = 255) -> bool:
    """Returns whether this PyTorch has oneDNN's convolutions and they add the greatest possible products of codes up to `most` exactly.

    Processors without dot-product instructions add pairs of products in 16 bits, which saturates for codes above 127.
    """
    codes = torch.full((1, 64, 5, 5), most, dtype=torch.uint8)
    codes[:, ::3] = 0
    weight = torch.full((16, 64, 3, 3), 127, dtype=torch.int8)
    weight[1::2] = -127
    weight[:, ::5] = 1
    try:
        for zero in (0, 97, most):
            got = through_onednn(weight, zero, (2, 1), (1, 1), (1, 1), 1)(codes)
            wanted = F.conv2d(codes.double() - zero, weight.double(), None, (2, 1), (1, 1))
            if not torch.equal(got.double(), wanted):
                return False
    except (AttributeError, RuntimeError, TypeError):  # another PyTorch, or one built without oneDNN
        return False
    return True
