"""Explicit integer arithmetic: a factor as `multiplier * 2^-shift`, a shift that rounds, a width that overflows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError

ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "trunc")
FLOAT32 = "float32"  # rounding of a requantization as runtimes compute it, see `requantized`
FLOAT32_SUM = "float32_sum"  # the same for a product of two tensors
RUNTIMES = (FLOAT32, FLOAT32_SUM)
OVERFLOWS = ("saturate", "wrap")
MAX_SHIFT = 46  # beyond it `zero_point << shift` leaves int64 for 16-bit codes
BYTE_SHIFT = 53  # the same for 8-bit codes
SUM_BITS = 62  # bits of int64 that products and sums may use

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
    raise QexpError(f"rounding={rounding!r} is not allowed; use {', '.join(ROUNDINGS)}")


def requantized(x: Any, factor: Any, addend: Any, shift: Any, rounding: str) -> Any:
    """Returns `(x * factor + addend) / 2^shift` rounded to integers, int64 of NumPy or torch.

    With `float32`, it computes as runtimes do: number and product are rounded to the 24 bits of a float32, the result half to even, and
    the zero point (`addend / 2^shift`) is added last. With `float32_sum`, as runtimes multiply two tensors, it is added before the
    rounding, so that an odd one turns ties around. The arithmetic is still on integers: converting an integer rounds to 24 bits.

    >>> [requantized(np.array([11]), 3, 0, 1, name).tolist() for name in ("half_even", "float32")]
    [[16], [16]]
    >>> [requantized(np.array([1]), 1, 3 << 1, 1, name).tolist() for name in ("float32", "float32_sum")]
    [[3], [4]]
    >>> requantized(np.array([2**24 + 1]), 1, 3 << 2, 2, "float32").tolist()
    [4194307]
    """
    if rounding not in RUNTIMES:
        return shift_round(x * factor + addend, shift, rounding)
    if rounding == FLOAT32_SUM:
        return shift_round(_held(_held(_held(x) * factor) + addend), shift)
    return shift_round(_held(_held(x) * factor), shift) + (addend >> shift)


def _held(x: Any) -> Any:
    """Returns integers as float32 holds them."""
    return x.astype(np.float32).astype(np.int64) if isinstance(x, np.ndarray | np.generic) else x.float().long()


def float32_factor(ratio: NDArray[np.float32]) -> tuple[Ints, Ints]:
    """Returns multiplier and shift that are positive float32 numbers exactly.

    >>> [a.tolist() for a in float32_factor(np.array([0.75], np.float32))]
    [[12582912], [24]]
    """
    fraction, exponent = np.frexp(np.atleast_1d(ratio).astype(np.float64))
    if not (np.isfinite(fraction).all() and (fraction > 0).all()):
        raise QexpError("a factor between two grids is zero, negative or not finite")
    whole, shift = np.ldexp(fraction, 24).astype(np.int64), 24 - exponent.astype(np.int64)
    # A factor this small turns every 32-bit number into 0.
    lost, left = np.maximum(shift - BYTE_SHIFT, 0), np.maximum(-shift, 0)
    return (whole >> np.minimum(lost, 62)) << left, np.clip(shift, 0, BYTE_SHIFT)


def multiplier(ratio: NDArray[np.float64], bits: int | Ints = 31) -> tuple[Ints, Ints]:
    """Returns multiplier and shift of positive factors, `ratio ~ multiplier * 2^-shift`; a power of two is exact, with multiplier 1.

    Args:
        ratio: Factors > 0, any shape.
        bits: Width of the multipliers without a sign, at most 31, one number or one per factor; their relative error is at most 2^-bits.

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
    """Returns real numbers rounded by the named rule, in their own type.

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
    """Returns integers as a two's complement register of `bits` holds them, and the number that did not fit.

    Args:
        x: Integers of NumPy or torch.
        bits: Width, sign included.
        overflow: `saturate` at the ends, or `wrap` around.
    """
    if overflow not in OVERFLOWS:
        raise QexpError(f"overflow={overflow!r} is not allowed; use {' or '.join(OVERFLOWS)}")
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
