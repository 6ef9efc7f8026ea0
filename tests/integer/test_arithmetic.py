"""Rounding shifts, multipliers and registers against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qexp.errors import QexpError
from qexp.integer.arithmetic import MAX_SHIFT, ROUNDINGS, limit, multiplier, shift_round, width

INTS = st.integers(-(2**61), 2**61)


def rounded(x: Fraction, rounding: str) -> int:
    """Returns a fraction rounded by the definition of the rounding's name."""
    low = math.floor(x)
    rest = x - low
    half = Fraction(1, 2)
    if rounding == "floor":
        return low
    if rounding == "trunc":
        return math.trunc(x)
    if rest != half:
        return low + (rest > half)
    return {"half_even": low + low % 2, "half_up": low + 1, "half_away": low + (x > 0)}[rounding]


@given(INTS, st.integers(0, 60), st.sampled_from(ROUNDINGS))
def test_shifts_round_as_fractions_do(x, shift, rounding):
    expected = rounded(Fraction(x, 2**shift), rounding)
    assert int(shift_round(np.array([x]), np.array([shift]), rounding)[0]) == expected
    assert int(shift_round(torch.tensor([x]), torch.tensor([shift]), rounding)[0]) == expected


@given(st.integers(-4096, 4096), st.integers(1, 4), st.sampled_from(ROUNDINGS))
def test_shifts_round_ties_by_name(k, shift, rounding):
    x = (2 * k + 1) << (shift - 1)  # an odd number of halves
    assert int(shift_round(np.array([x]), shift, rounding)[0]) == rounded(Fraction(x, 2**shift), rounding)


def test_the_roundings_are_those_of_the_quantizers():
    halves = np.array([-5, -3, -1, 1, 3, 5])
    expected = {"half_even": [-2, -2, 0, 0, 2, 2], "half_up": [-2, -1, 0, 1, 2, 3], "half_away": [-3, -2, -1, 1, 2, 3]}
    assert {name: shift_round(halves, 1, name).tolist() for name in expected} == expected
    assert shift_round(halves, 1, "trunc").tolist() == [-2, -1, 0, 0, 1, 2]
    with pytest.raises(QexpError, match="rounding='stochastic' is not allowed; use half_even"):
        shift_round(halves, 1, "stochastic")


@given(st.floats(1e-6, 200.0), st.integers(8, 31))
def test_a_multiplier_is_as_near_as_its_bits_allow(ratio, bits):
    factor, shift = multiplier(np.array([ratio]), bits)
    assert 0 <= factor[0] < 2**31 and 0 <= shift[0] <= MAX_SHIFT
    exact = Fraction(ratio)
    assert abs(Fraction(int(factor[0]), 2 ** int(shift[0])) - exact) <= max(
        exact / 2**bits, Fraction(1, 2 ** (MAX_SHIFT + 1))
    )


@given(st.integers(-20, 20))
def test_a_power_of_two_is_a_plain_shift(exponent):
    factor, shift = multiplier(np.array([2.0**exponent]))
    assert Fraction(int(factor[0]), 2 ** int(shift[0])) == Fraction(2) ** exponent
    assert factor[0] == 1 or shift[0] == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e30])
def test_factors_that_no_integer_holds_are_refused(bad):
    with pytest.raises(QexpError, match="factor"):
        multiplier(np.array([bad]))


@given(INTS, st.integers(2, 40))
def test_a_register_saturates_or_wraps(x, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    outside = not low <= x <= high
    for values in (np.array([x]), torch.tensor([x])):
        held, lost = limit(values, bits, "saturate")
        assert int(held[0]) == min(max(x, low), high) and lost == outside
        held, lost = limit(values, bits, "wrap")
        assert low <= int(held[0]) <= high and (int(held[0]) - x) % 2**bits == 0 and lost == outside


@given(st.integers(-(2**20), 2**20), st.integers(0, 2**20))
def test_width_is_the_least_that_holds_both_ends(low, span):
    high = low + span
    bits = width(low, high)

    def holds(b: int) -> bool:
        return low >= 0 and high < 2**b if low >= 0 else -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)

    assert holds(bits) and (bits == 1 or not holds(bits - 1))
