"""A convolution of bytes and what follows it up to the next one, a tile at a time: the sums never lie in memory as a whole."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from ..library import constant, define
from ..regrid import Pass
from ..regrid.reference import FORMS
from . import reference

define(
    "fused_conv(Tensor x, Tensor weight, Tensor less, int zero, int[] window, Tensor[] others, Tensor[] constants, "
    "Tensor[] tables, int[] steps, int[] forms, bool wide) -> Tensor[]",
    reference.forward,
    lambda x, weight, less, zero, window, others, constants, tables, steps, forms, wide: [
        x.new_empty((x.shape[0], less.numel(), *_size(x, window)), dtype=FORMS[f]).contiguous(
            memory_format=torch.channels_last
        )
        for f in forms
    ],
)
constant("fused_conv")


class Products(NamedTuple):
    """A convolution of bytes whose channels are all together, or each by itself.

    Attributes:
        weight: As the kernels read it.
        less: int32, one per output: what the zero point adds to the sum of products.
        zero: Byte of zero, which lies beyond the border.
        window: Kernel, stride, padding and dilation, two numbers each.
        wide: Whether the sums pass the integers that float32 holds; they are below 2^31.
    """

    weight: Tensor
    less: Tensor
    zero: int
    window: list[int]
    wide: bool


def products(
    weight: Tensor,
    zero: int,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    wide: bool = False,
) -> Products:
    """Returns a convolution as `fused_conv` takes it.

    Args:
        weight: int8 `[O, I, kh, kw]`, or `[C, 1, kh, kw]` for each channel by itself.
        zero: Byte of zero.
        stride, padding, dilation, groups: Of the convolution; 1 group, or one per channel.
        wide: See `Products`.

    Raises:
        KernelError: The convolution is of another kind.
    """
    if weight.dtype != torch.int8 or weight.dim() != 4 or not 0 <= zero <= 255:
        raise KernelError("weight, zero: expected int8 [O, I, kh, kw] or [C, 1, kh, kw], and a byte")
    kernel = list(weight.shape[2:])
    window = [*kernel, *stride, *padding, *dilation]
    less = zero * weight.int().sum((1, 2, 3), dtype=torch.int32)
    if groups == 1 and kernel == [1, 1] and not any(padding):
        return Products(reference.blocked(weight[:, :, 0, 0]), less, zero, window, wide)
    if groups == 1:
        return Products(reference.parted(weight, 1 if kernel[1] == 1 else dilation[1]), less, zero, window, wide)
    if groups != len(weight) or weight.shape[1] != 1:
        raise KernelError(f"weight: got {list(weight.shape)}, expected one group, or one input per output")
    return Products(weight[:, 0].permute(1, 2, 0).flatten(0, 1).to(torch.int16).contiguous(), less, zero, window, wide)


def fused_conv(x: Tensor, convolution: Products, behind: Pass, others: Sequence[Tensor] = ()) -> list[Tensor]:
    """Returns the results of a pass, whose first place is the sums of products; no gradient.

    Args:
        x: Bytes `[N, I, H, W]`.
        convolution: See `products`.
        behind: Steps whose places are the sums, `others`, then the results; see `regrid`.
        others: Up to three tensors of the shape of the results.

    Returns:
        Tensors `[N, O, H', W']` with channels innermost.

    Raises:
        KernelError: An argument does not fit the others.
    """
    weight, less, zero, window, wide = convolution
    inputs = x.shape[1] if x.dim() == 4 else 0
    if x.dtype != torch.uint8 or x.dim() != 4 or not _reads(convolution, inputs) or less.device != x.device:
        raise KernelError(f"x: expected bytes [N, I, H, W] of the weight's inputs on its device, got {list(x.shape)}")
    shape = (x.shape[0], less.numel(), *_size(x, window))
    if min(shape[2:]) < 1:
        raise KernelError(f"x: got {list(x.shape)}, smaller than the window {window}")
    if any(y.shape != shape or y.device != x.device for y in others):
        raise KernelError(f"others: expected tensors {list(shape)} on the device of x")
    behind.check(less.numel(), torch.float64 if wide else torch.float32, *[y.dtype for y in others])
    return torch.ops.qexp.fused_conv.default(
        x, weight, less, zero, window, list(others), behind.constants, behind.tables, behind.flat, behind.forms, wide
    )


def _reads(convolution: Products, inputs: int) -> bool:
    """Returns whether a convolution's weight is one for so many inputs."""
    weight, window = convolution.weight, convolution.window
    if weight.dim() == 2:
        return weight.shape[1] == inputs
    if weight.dim() == 4:
        return weight.shape[1] == -(-inputs // reference.QUAD)
    return weight.shape[2] == -(-inputs * window[0] * window[1] // weight.shape[1] // reference.QUAD)


def _size(x: Tensor, window: Sequence[int]) -> list[int]:
    return [
        (x.shape[2 + d] + 2 * window[4 + d] - window[6 + d] * (window[d] - 1) - 1) // window[2 + d] + 1
        for d in range(2)
    ]
