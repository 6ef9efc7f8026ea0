"""The widths that a user may type. Needs no torch, so that a wrong one is refused before torch is loaded."""

from __future__ import annotations

from typing import Any

from qexp.errors import QexpError

FLOAT = 32  # bits: a tensor of this width stays float
MOST = 16  # bits of a quantizer; biases are added to sums and may have more


def width(bits: Any, where: str, site: str = "") -> int:
    """Returns a width that a user typed; None means float. Only this function defines the allowed widths; a method may allow fewer.

    Raises:
        QexpError: The value is not an allowed width.
    """
    if bits is None:
        return FLOAT
    most = FLOAT - 1 if site == "bias" else MOST
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= most or bits == FLOAT):
        raise QexpError(f"{where}: got {bits!r}; allowed are whole numbers of bits 1..{most}, or {FLOAT} for float")
    return bits
