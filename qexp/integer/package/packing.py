"""Integer weights in the form that takes the fewest bytes: codes of few bits, or places in a table of their values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import width


def form(codes: NDArray[np.int64]) -> tuple[int, bool]:
    """Returns bits and signedness of the narrowest integers that hold these codes."""
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    return width(low, high), low < 0


@dataclass(frozen=True)
class Coded:
    """Weights as they are packed.

    Attributes:
        codes: The integers themselves or, with a table `levels`, each one's index in its row.
        bits, signed: Width and signedness of the codes.
        levels: `[1, L]` for all weights, or `[O, L]`, one row per output; None if the codes are the integers.
    """

    codes: NDArray[np.int64]
    bits: int
    signed: bool
    levels: NDArray[np.int64] | None = None

    @property
    def table(self) -> bytes:
        """The table as int32, little endian; empty without one."""
        return b"" if self.levels is None else self.levels.astype("<i4").tobytes()


def coded(weight: NDArray[np.int64]) -> Coded:
    """Returns integer weights `[O, ...]` in the form that takes the fewest bytes, its table included.

    >>> coded(np.array([[1, -1, -1, 1] * 20])).bits, coded(np.array([[-64, 1, 16, 0] * 20])).levels.tolist()
    (1, [[-64, 0, 1, 16]])
    """
    forms = [Coded(weight, *form(weight))]
    for rows in (weight.reshape(1, -1), weight.reshape(len(weight), -1)):
        found = [np.unique(row) for row in rows]
        most = max(map(len, found), default=0)
        bits = width(0, max(most - 1, 0))
        if most and bits < forms[0].bits:
            levels = np.stack(
                [row[np.minimum(np.arange(most), len(row) - 1)] for row in found]
            )  # the last one repeated
            places = np.stack([np.searchsorted(row, values) for row, values in zip(found, rows)])
            forms.append(Coded(places.reshape(weight.shape), bits, False, levels))
    return min(forms, key=lambda f: len(f.table) + -(-f.bits * weight.size // 8))


def weights(codes: NDArray[np.int64], levels: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Returns the integer weights `[O, ...]` of codes."""
    if levels is None:
        return codes
    rows = codes.reshape(len(levels), -1)
    if rows.size and rows.max() >= levels.shape[1]:
        raise QexpError(f"a code of {int(rows.max())} lies beyond its table of {levels.shape[1]} levels")
    return np.take_along_axis(levels, rows, 1).reshape(codes.shape)
