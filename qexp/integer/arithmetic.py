"""Integer arithmetic that is stated, not implied: a factor as `multiplier * 2^-shift`, a shift that rounds, a width that overflows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError

ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "trunc")
OVERFLOWS = ("saturate", "wrap")
MAX_SHIFT = 46  # beyond it `zero_point << shift` leaves int64 for 16-bit codes
SUM_BITS = 62  # what products and sums may take of int64

Ints = NDArray[np.int64]


def shift_round(x: Any, shift: Any, rounding: str = "half_even") -> Any:
    """Returns `x / 2^shift` rounded to integers; arrays of NumPy and tensors of torch alike (int64).

    Args:
        x: Integers.
        shift: Bits to drop, 0..62, broadcasting against `x`.
        rounding: Ties to even (`half_even`), upwards (`half_up`), away from zero (`half_away`); or `floor`, or `trunc` toward zero.

    >>> shift_round(np.array([-5, -3, -1, 1, 3, 5]), 1).tolist()
    [-2, -2, 0, 0, 2, 2]
    >>> shift_round(np.array([-5, -3, -1, 1, 3, 5]), 1, "half_away").tolist()
    [-3, -2, -1, 1, 2, 3]
    """
    whole = x >> shift
    rest = x - (whole << shift)
    if rounding == "floor":
        return whole
    if rounding == "trunc":
        return whole + ((rest != 0) & (x < 0))
    double = rest << 1  # against 2^shift, so that no half of a single bit is needed
    one = (rest - rest + 1) << shift
    if rounding == "half_even":
        return whole + ((double > one) | ((double == one) & ((whole & 1) == 1)))
    if rounding == "half_up":
        return whole + ((double >= one) & (rest != 0))
    if rounding == "half_away":
        return whole + ((double > one) | ((double == one) & (x >= 0)))
    raise QexpError(f"rounding={rounding!r}; integer arithmetic has {', '.join(ROUNDINGS)}")


def multiplier(ratio: NDArray[np.float64], bits: int = 31) -> tuple[Ints, Ints]:
    """Returns multiplier and shift of positive factors: `ratio ~ multiplier * 2^-shift`, a power of two exactly and as 1 (a plain shift).

    Args:
        ratio: Factors > 0, any shape.
        bits: Width of the multipliers without a sign, at most 31; their relative error is at most 2^-bits.

    >>> [a.tolist() for a in multiplier(np.array([0.25, 8.0, 0.3]), 8)]
    [[1, 8, 154], [2, 0, 9]]
    """
    ratio = np.atleast_1d(np.asarray(ratio, dtype=np.float64))
    if not (np.isfinite(ratio).all() and (ratio > 0).all()):
        raise QexpError("a factor between two grids is zero, negative or not finite")
    fraction, exponent = np.frexp(ratio)
    width = np.where(fraction == 0.5, 1, bits)  # a power of two needs one bit
    shift = np.minimum(width - exponent, MAX_SHIFT)
    whole = np.rint(np.ldexp(ratio, shift)).astype(np.int64)
    full = whole >= 2**31  # rounded up to 2^31
    whole, shift = np.where(full, whole >> 1, whole), np.where(full, shift - 1, shift)
    left = np.maximum(-shift, 0)
    if (left + np.ceil(np.log2(np.maximum(whole, 1))) > 40).any():
        raise QexpError(f"a factor of {float(ratio.max()):.3g} between two grids is too large for integers")
    return (whole << left).astype(np.int64), np.maximum(shift, 0).astype(np.int64)


def round_reals(x: NDArray, rounding: str) -> NDArray:
    """Returns real numbers rounded by name, in their own type.

    >>> [round_reals(np.array([-2.5, -0.5, 0.5, 1.5]), name).tolist() for name in ("half_even", "half_up", "half_away")]
    [[-2.0, -0.0, 0.0, 2.0], [-2.0, 0.0, 1.0, 2.0], [-3.0, -1.0, 1.0, 2.0]]
    """
    if rounding in ("half_even", "floor", "trunc"):
        return {"half_even": np.rint, "floor": np.floor, "trunc": np.trunc}[rounding](x)
    low = np.floor(x)
    return low + ((x - low > 0.5) | ((x - low == 0.5) & ((rounding == "half_up") | (x >= 0))))


def nearest(x: Any) -> Any:
    """Returns `floor(x + 1/2)` of float64 numbers: with it, rounding a sum of an integer and a real equals rounding the real."""
    return np.floor(x + 0.5)


def limit(x: Any, bits: int, overflow: str) -> tuple[Any, int]:
    """Returns integers as a two's complement register of `bits` holds them, and how many did not fit.

    Args:
        x: Integers of NumPy or torch.
        bits: Width, sign included.
        overflow: `saturate` at the ends, or `wrap` around.
    """
    if overflow not in OVERFLOWS:
        raise QexpError(f"overflow={overflow!r}; allowed are {', '.join(OVERFLOWS)}")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    lost = int(((x < low) | (x > high)).sum())
    if not lost:
        return x, 0
    if overflow == "saturate":
        return x.clip(low, high), lost
    return ((x - low) & ((1 << bits) - 1)) + low, lost


def width(low: int, high: int) -> int:
    """Returns the bits that hold all integers from `low` to `high`: unsigned where none is negative.

    >>> width(0, 255), width(-128, 127), width(-3, 3), width(0, 0)
    (8, 8, 3, 1)
    """
    low, high = int(low), int(high)
    if low >= 0:
        return max(high.bit_length(), 1)
    return max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1
