"""Codes of 1 to 16 bits stored without gaps."""

import torch
from torch import Tensor

from ..errors import KernelError
from ..library import define
from . import reference

define(
    "pack_bits(Tensor codes, int bits) -> Tensor",
    reference.pack,
    lambda codes, bits: codes.new_empty((codes.numel() * bits + 7) // 8, dtype=torch.uint8),
)
define(
    "unpack_bits(Tensor packed, int bits, int count, bool signed) -> Tensor",
    reference.unpack,
    lambda packed, bits, count, signed: packed.new_empty(count, dtype=torch.int32),
)


def _bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise KernelError(f"bits: got {bits}, expected 1 to 16")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Returns the codes as a stream of bytes, uint8 [ceil(numel * bits / 8)], lowest bit first.

    Args:
        codes: Integers of any shape, signed (two's complement) or not, that fit `bits` bits.
        bits: 1 to 16.
    """
    _bits(bits)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise KernelError(f"codes: got dtype {codes.dtype}, expected integers")
    if codes.device.type == "cpu" and codes.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in codes.aminmax())
        if low < -(1 << (bits - 1)) or high >= 1 << bits or (low < 0 and high >= 1 << (bits - 1)):
            raise KernelError(f"codes: values reach from {low} to {high}, which does not fit {bits} bits")
    return torch.ops.qexp.pack_bits(codes, bits)


def unpack_bits(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Returns the first `count` codes of a stream made by `pack_bits`, int32 [count]."""
    _bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise KernelError(f"packed: got {packed.dtype} of shape {tuple(packed.shape)}, expected uint8 [bytes]")
    if not 0 <= count * bits <= packed.numel() * 8:
        raise KernelError(f"count: got {count} codes of {bits} bits, but packed has {packed.numel()} bytes")
    return torch.ops.qexp.unpack_bits(packed, bits, count, signed)
