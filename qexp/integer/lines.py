"""What a region's tensors are in terms of the places it reads: numbers on a line, or a table of codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexp.integer.machine import DOUBLE
from qexp.integer.program import Clamp, Requantize
from qexp.integer.reference import requantize

Reals = NDArray[np.float64]
Ints = NDArray[np.int64]
FAR = 2**62  # beyond every integer of a program


@dataclass(frozen=True)
class Line:
    """Integers `clip(place * factor + summand, low, high)`, each one number or one per channel, held by float64 in every step.

    Attributes:
        place: The place that is read.
        factor, summand: Whole numbers.
        low, high: Limits.
        most: Bound of the magnitude before the clip.
    """

    place: int
    factor: Ints
    summand: Ints
    low: Ints
    high: Ints
    most: int

    def clamped(self, op: Clamp) -> Line:
        """Returns the line behind a clamp."""
        low, high = (np.clip(end, op.low, op.high) for end in (self.low, self.high))
        return Line(self.place, self.factor, self.summand, low, high, self.most)


def line_of(place: int, factor: int, summand: Ints, most: int) -> Line:
    """Returns a line without limits."""
    return Line(place, np.array([factor]), np.atleast_1d(summand), np.array([-FAR]), np.array([FAR]), most)


def mapped(op: Requantize, reach: int) -> tuple[Reals, Reals] | None:
    """Returns a requantization of integers up to `reach` as `x * factor + summand`; None if float64 does not hold every step exactly."""
    most = (reach + int(np.abs(op.zero).max())) * int(np.abs(op.multiplier).max()) + int(np.abs(op.addend).max())
    if most >= DOUBLE:
        return None
    factor = np.ldexp(op.multiplier.astype(np.float64), -op.shift)
    return factor, np.ldexp((op.addend - op.zero * op.multiplier).astype(np.float64), -op.shift)


def limits_behind(op: Requantize, line: Line) -> tuple[Ints, Ints] | None:
    """Returns limits of codes, one number or one per channel, that replace the limits of a line; None if they do not.

    A requantization keeps the order, so it maps a limit like a number; a limit that no number reaches has no effect.
    """
    low, high = np.array([op.low]), np.array([op.high])
    if (line.low <= -line.most).all() and (line.high >= line.most).all():
        return low, high
    if (op.multiplier <= 0).any():
        return None
    ends = [np.clip(end, -line.most, line.most) for end in (line.low, line.high)]
    if mapped(op, line.most) is None:
        return None
    low, high = (requantize(op, end.reshape(1, -1))[0] for end in ends)
    return low, high


@dataclass(frozen=True)
class Codes:
    """Integers that a table gives for one or two bytes.

    Attributes:
        places: One or two places of bytes.
        table: `[256]` or `[256, 256]`, an integer for each byte or pair of bytes.
        within: The least and the greatest byte of each place.
        slopes: Factor of each place in the real number that the table rounds; None if it is no line.
        height: Summand of that number.
    """

    places: tuple[int, ...]
    table: Ints
    within: tuple[tuple[int, int], ...]
    slopes: tuple[float, ...] | None
    height: float

    def over(self, places: tuple[int, ...], within: tuple[tuple[int, int], ...]) -> Codes:
        """Returns the same integers as a table of these places, which are its own in any order, or more."""
        table, slopes = self.table, self.slopes
        if len(places) > len(self.places):
            is_first = places[0] == self.places[0]
            table = np.broadcast_to(table[:, None] if is_first else table[None], (256, 256))
            slopes = slopes and ((slopes[0], 0.0) if is_first else (0.0, slopes[0]))
        elif places != self.places:
            table, slopes = table.T, slopes and slopes[::-1]
        return Codes(places, table, within, slopes, self.height)


def bytes_at(place: int, offset: int, low: int, high: int) -> Codes:
    """Returns the codes between `low` and `high` that lie at a place as bytes, code plus `offset`; other bytes do not come."""
    codes = np.clip(np.arange(256) - offset, low, high)
    return Codes((place,), codes, ((low + offset, high + offset),), (1.0,), -float(offset))


def straight(codes: Codes) -> tuple[tuple[float, ...], float, int, int] | None:
    """Returns slopes, summand and limits with which `clip(rint(line), low, high)` gives the whole table; None if no line does.

    All bytes or pairs of bytes are tried.
    """
    if codes.slopes is None:
        return None
    axes = np.meshgrid(*[np.arange(first, last + 1.0) for first, last in codes.within], indexing="ij")
    table = codes.table[tuple(slice(first, last + 1) for first, last in codes.within)]
    low, high = int(table.min()), int(table.max())
    rough = sum(axis * slope for axis, slope in zip(axes, codes.slopes))
    gap = table - rough
    above, below = (gap - 0.5)[table > low], (gap + 0.5)[table < high]
    ends = above.max(initial=-np.inf), below.min(initial=np.inf)
    tried = [codes.height, sum(ends) / 2 if np.isfinite(ends).all() else codes.height]
    for summand in tried:
        if np.array_equal(np.clip(np.rint(rough + summand), low, high), table):
            return codes.slopes, float(summand), low, high
    return None
