"""A convolution of bytes and the pass behind it in plain PyTorch: the reference for every other implementation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..regrid import reference as regrid

LANES, QUAD = 16, 4  # outputs of a block of weights, and inputs that are multiplied together


def blocked(weight: Tensor) -> Tensor:
    """Returns int8 weights `[O, I]` as `[O / 16, I / 4, 16, 4]`, both rounded up with zeros."""
    outputs, inputs = weight.shape
    weight = F.pad(weight, (0, -inputs % QUAD, 0, -outputs % LANES))
    return weight.reshape(-1, LANES, weight.shape[1] // QUAD, QUAD).transpose(1, 2).contiguous()


def parted(weight: Tensor, dilation: int) -> Tensor:
    """Returns int8 weights `[O, I, kh, kw]` as `[O / 16, parts, bytes / 4, 16, 4]`, rounded up with zeros.

    A part is what lies together in memory: a row of the window, or a pixel of it where `dilation` leaves out columns.
    """
    outputs, inputs, rows, columns = weight.shape
    count = rows * (1 if dilation == 1 else columns)
    parts = weight.permute(0, 2, 3, 1).reshape(outputs, count, rows * columns * inputs // count)
    parts = F.pad(parts, (0, -parts.shape[2] % QUAD, 0, 0, 0, -outputs % LANES))
    return parts.reshape(-1, LANES, count, parts.shape[2] // QUAD, QUAD).permute(0, 2, 3, 1, 4).contiguous()


def whole(weight: Tensor, outputs: int, inputs: int, kernel: list[int]) -> Tensor:
    """Returns the weights `[O, I, kh, kw]` that `parted` was given."""
    count = weight.shape[1]
    parts = weight.permute(0, 3, 1, 2, 4).reshape(weight.shape[0] * LANES, count, -1)
    parts = parts[:outputs, :, : kernel[0] * kernel[1] * inputs // count]
    return parts.reshape(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def forward(
    x: Tensor,
    weight: Tensor,
    less: Tensor,
    zero: int,
    window: list[int],
    others: list[Tensor],
    constants: list[Tensor],
    tables: list[Tensor],
    steps: list[int],
    forms: list[int],
    wide: bool,
) -> list[Tensor]:
    """Returns the results of the steps, whose first place is the sum of products."""
    kernel, stride, padding, dilation = window[:2], window[2:4], window[4:6], window[6:]
    outputs, channels = less.numel(), x.shape[1]
    if weight.dim() == 4:
        flat = weight.transpose(1, 2).reshape(weight.shape[0] * LANES, -1)
        weight, groups = flat[:outputs, :channels, None, None], 1
    elif weight.dim() == 5:
        weight, groups = whole(weight, outputs, channels, kernel), 1
    else:
        weight, groups = weight.reshape(*kernel, channels).permute(2, 0, 1)[:, None], channels
    x = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=float(zero))
    sums = F.conv2d(x, weight.double(), -less.double(), stride, 0, dilation, groups)
    sums = sums.to(torch.float64 if wide else torch.float32).contiguous(memory_format=torch.channels_last)
    return regrid.forward([sums, *others], constants, tables, steps, forms)
