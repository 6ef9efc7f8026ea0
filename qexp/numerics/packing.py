"""Packs integer codes of a few bits into bytes, and unpacks them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError


def pack(codes: NDArray[np.int64], bits: int) -> bytes:
    """Returns the low `bits` bits of each code in C order, lowest bit first; the last byte is filled with zeros.

    >>> pack(np.array([1, -2, 3, -4]), 3).hex()
    'f108'
    """
    stream = (codes.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack(packed: bytes, count: int, bits: int, signed: bool) -> NDArray[np.int64]:
    """Returns `count` codes.

    Raises:
        QexpError: The bytes are fewer than that.

    >>> unpack(bytes.fromhex("f108"), 4, 3, True).tolist()
    [1, -2, 3, -4]
    """
    if len(packed) * 8 < count * bits:
        raise QexpError(f"{len(packed)} bytes are too few for {count} codes of {bits} bits: cut short")
    stream = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    value = (stream.astype(np.int64) << np.arange(bits)).sum(1)
    return value - (stream[:, -1].astype(np.int64) << bits) if signed and count else value
