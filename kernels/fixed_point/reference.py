"""Convolution with every product rounded and saturated, in plain PyTorch, chunk by chunk."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..round_to.reference import round_to

CHUNK = 1 << 21  # greatest number of products in memory at once


def _quantize(x: Tensor, bits: int, rounding: str) -> Tensor:
    return round_to(x, rounding).clamp_(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def _accumulate(weight: Tensor, columns: Tensor, bits: int, accumulate: str, rounding: str) -> Tensor:
    """Returns the codes before the bias: [Cout, K] and [K, L], weights in output steps -> [Cout, L]."""
    if accumulate == "per_op":
        products = _quantize(weight[:, :, None] * columns[None], bits, rounding)
        return _quantize(products.sum(1), bits, rounding)
    total = weight.new_zeros(weight.shape[0], columns.shape[1])
    for w, column in zip(weight.unbind(1), columns.unbind(0), strict=True):
        total = _quantize(total + _quantize(w[:, None] * column, bits, rounding), bits, rounding)
    return total


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    bits: int,
    fraction_bits: int,
    accumulate: str,
    rounding: str,
) -> Tensor:
    """Returns the output [N, Cout, Ho, Wo]; products are exact (float64) before they are rounded."""
    one = 2.0**fraction_bits
    # Scaling by a power of two is exact, so the product arrives in output steps, where rounding is to integers.
    w = weight.to(torch.float32).to(torch.float64).flatten(1) * one
    size = [
        (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    out = x.new_empty((x.shape[0], weight.shape[0], size[0] * size[1]))
    b = None if bias is None else bias.to(torch.float32).to(torch.float64)[:, None] * one
    per_group = weight.shape[0] // groups
    for n in range(x.shape[0]):
        for g, part in enumerate(x[n : n + 1].to(torch.float32).chunk(groups, 1)):
            columns = F.unfold(part, weight.shape[2:], dilation, padding, stride)[0].to(torch.float64)
            step = max(1, CHUNK // max(1, per_group * w.shape[1]))
            rows = slice(g * per_group, (g + 1) * per_group)
            for start in range(0, columns.shape[1], step):
                chunk = columns[:, start : start + step]
                y = _accumulate(w[rows], chunk, bits, accumulate, rounding)
                if b is not None:
                    y = _quantize(y + b[rows], bits, rounding)
                out[n, rows, start : start + step] = (y / one).to(x.dtype)
    out = out.reshape(x.shape[0], weight.shape[0], *size)
    return out.contiguous(memory_format=torch.channels_last) if channels_last(x) else out


def channels_last(x: Tensor) -> bool:
    """Returns whether the output for `x` is laid out channels_last."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
