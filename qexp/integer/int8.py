"""Exact convolutions on 8-bit codes with the processor's dot products, through PyTorch's oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.integer.bounds import partial_sums
from qexp.integer.program import Conv

_EXACT = 2**24  # below it float32, in which the sums come back, holds every integer


def suits(op: Conv, low: int, high: int) -> bool:
    """Returns whether a convolution of codes between `low` and `high` can run in this form exactly on this machine."""
    shift = _shift(low)
    fits = low + shift >= 0 and high + shift <= 255 and np.abs(op.weight).max(initial=0) <= 127 and op.zero.size == 1
    return bool(fits) and max(map(abs, partial_sums(op, low, high))) < _EXACT and available()


def convolution(op: Conv, low: int) -> Callable[[Tensor], Tensor]:
    """Returns the sums of a convolution that `suits` as a function, float32, channels innermost; `low` is the least code."""
    weight, shift = torch.from_numpy(op.weight.astype(np.int8)), _shift(low)
    return _through_onednn(weight, int(op.zero[0]) + shift, op.stride, op.padding, op.dilation, op.groups, shift)


def _shift(low: int) -> int:
    return 128 if low < 0 else 0  # signed codes are moved into 0..255, and their zero with them


def _through_onednn(weight: Tensor, zero: int, stride, padding, dilation, groups: int, shift: int = 0):
    ones, none = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    window = list(stride), list(padding), list(dilation), groups
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, zero, *window, None)

    def step(x: Tensor) -> Tensor:
        if x.dtype is not torch.uint8:
            x = (x + shift if shift else x).to(torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise(
            x, 1.0, zero, packed, ones, none, None, *window, 1.0, 0, torch.float32, "none", [], ""
        )

    return step


@cache
def available() -> bool:
    """Whether this PyTorch has oneDNN's convolutions and they add the greatest possible products exactly.

    Processors without dot-product instructions add pairs of products in 16 bits, which saturates.
    """
    codes = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8)
    codes[:, ::3] = 0
    weight = torch.full((16, 64, 3, 3), 127, dtype=torch.int8)
    weight[1::2] = -127
    weight[:, ::5] = 1
    try:
        for zero in (0, 97, 255):
            got = _through_onednn(weight, zero, (2, 1), (1, 1), (1, 1), 1)(codes)
            wanted = F.conv2d(codes.double() - zero, weight.double(), None, (2, 1), (1, 1))
            if not torch.equal(got.double(), wanted):
                return False
    except (AttributeError, RuntimeError, TypeError):  # another PyTorch, or one built without oneDNN
        return False
    return True
