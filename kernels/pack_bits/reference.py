"""Packing of codes into bytes in plain PyTorch."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns the low `bits` bits of each code, one after the other, lowest bit first."""
    flat = codes.reshape(-1, 1).to(torch.int64)
    stream = ((flat >> torch.arange(bits, device=codes.device)) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Returns the first `count` codes as int32."""
    stream = ((packed.to(torch.int64)[:, None] >> torch.arange(8, device=packed.device)) & 1).reshape(-1)
    weights = 1 << torch.arange(bits, device=packed.device)
    if signed:
        weights[-1] = -weights[-1]
    return (stream[: count * bits].reshape(count, bits) * weights).sum(1).to(torch.int32)
