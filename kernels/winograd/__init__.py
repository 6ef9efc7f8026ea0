"""Convolution of integer codes in the Winograd domain, as integer hardware computes it."""

import torch
from torch import Tensor

from ..errors import KernelError
from ..library import define
from . import reference
from .matrices import MATRICES

__all__ = ["MATRICES", "winograd_conv2d"]


def _fake(x, weight, outputs, two_d, padding, clamp):
    size = (x.shape[0], weight.shape[0], x.shape[2] + 2 * padding - 2, x.shape[3] + 2 * padding - 2)
    return x.new_empty(size, dtype=torch.int64), x.new_empty(2, dtype=torch.int64)


define(
    "winograd_conv2d(Tensor x, Tensor weight, int outputs, bool two_d, int padding, bool clamp) -> (Tensor, Tensor)",
    reference.forward,
    _fake,
)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    outputs: int = 4,
    two_d: bool = False,
    padding: int = 0,
    clamp_int16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the int64 accumulators [N, Cout, Ho, Wo] of a 3x3 convolution and the saturation counts [2].

    Transformed weights `U = G w` and inputs `V = B^T x` are integers; with `clamp_int16` they saturate to 16 bits (the
    counts are those of weights and of inputs); without it the result equals the direct integer convolution
    bit for bit. Stride 1, one group; widths that are not a multiple of the tile are padded and cropped.

    Args:
        x: Integer codes [N, Cin, H, W], any integer dtype.
        weight: Integer codes [Cout, Cin, 3, 3].
        outputs: Results per tile: 2, 4 or 5, for F(2,3), F(4,3), F(5,3).
        two_d: Nest in both directions; False transforms each kernel row along the width.
        padding: Number of zeros on each side.
        clamp_int16: Saturate the transformed weights and inputs.
    """
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
            raise KernelError(f"{name}: got dtype {t.dtype}, expected integer codes")
    if weight.device != x.device:
        raise KernelError(f"weight: is on {weight.device}, but x is on {x.device}")
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise KernelError(f"weight: got {tuple(weight.shape)} for x {tuple(x.shape)}, expected [Cout, Cin, 3, 3]")
    if outputs not in MATRICES:
        raise KernelError(f"outputs: got {outputs}, expected one of {', '.join(map(str, MATRICES))}")
    if padding < 0 or min(x.shape[2:]) + 2 * padding < 3:
        raise KernelError(
            f"padding: got {padding} for x {tuple(x.shape)}, expected >= 0 and at least 3 rows and columns"
        )
    return torch.ops.qexp.winograd_conv2d(x, weight, outputs, two_d, padding, clamp_int16)
