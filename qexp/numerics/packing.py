"""Packs integer codes of a few bits into bytes, and unpacks them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError

AT_A_TIME = 2**20  # codes, a multiple of 8: their bits take 64 times the memory of the bytes that they become


def pack(codes: NDArray[np.int64], bits: int) -> bytes:
    """Returns the low `bits` bits of each code in C order, lowest bit first; the last byte is filled with zeros.

    >>> pack(np.array([1, -2, 3, -4]), 3).hex()
    'f108'
    """
    flat, places = codes.reshape(-1), np.arange(bits)
    parts = []
    for first in range(0, max(flat.size, 1), AT_A_TIME):
        stream = (flat[first : first + AT_A_TIME, None] >> places) & 1
        parts.append(np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def unpack(packed: bytes, count: int, bits: int, signed: bool) -> NDArray[np.int64]:
    """Returns `count` codes.

    Raises:
        QexpError: The bytes are fewer than that.

    >>> unpack(bytes.fromhex("f108"), 4, 3, True).tolist()
    [1, -2, 3, -4]
    """
    if len(packed) * 8 < count * bits:
        raise QexpError(f"{len(packed)} bytes are too few for {count} codes of {bits} bits: cut short")
    found, places = np.zeros(count, np.int64), np.arange(bits)
    for first in range(0, count, AT_A_TIME):
        codes = min(AT_A_TIME, count - first)
        part = packed[first * bits // 8 : (first + codes) * bits // 8 + 1]
        stream = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")[: codes * bits].reshape(codes, bits)
        value = (stream.astype(np.int64) << places).sum(1)
        found[first : first + codes] = value - (stream[:, -1].astype(np.int64) << bits) if signed else value
    return found
