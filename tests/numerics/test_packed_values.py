"""Values on few levels are held at their own bits and come back to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexp.errors import QexpError
from qexp.numerics.packed_values import Packed, packed


@given(
    st.integers(1, 8),
    st.booleans(),
    st.lists(st.floats(0.0009765625, 10, width=32), min_size=3, max_size=3),
    st.integers(0, 2**31),
)
def test_multiples_of_steps_take_their_own_bits(bits, by_row, steps, seed):
    step = np.array(steps if by_row else steps[:1], np.float32)
    low = -(2 ** (bits - 1))
    integers = np.random.RandomState(seed).randint(low, low + 2**bits, (3, 40, 3, 3))
    values = integers.astype(np.float32) * step.reshape(-1, 1, 1, 1)
    found = packed(values, step)
    assert np.array_equal(found.values(), values)
    assert found.bits <= bits and found.nbytes <= 3 * 360 * bits / 8 + 3 * 8 + 1
    arrays, about = found.arrays("w")
    assert np.array_equal(Packed.of("w", arrays, about).values(), values)


@pytest.mark.parametrize("rows", [1, 6])
def test_uneven_levels_become_places_in_a_table(rows):
    random = np.random.RandomState(0)
    levels = np.sort(random.randn(rows, 4).astype(np.float32), 1)
    places = random.randint(0, 4, (rows, 6 // rows * 200))
    values = np.take_along_axis(levels, places, 1).reshape(6, 200)
    found = packed(values, np.ones(1, np.float32))
    assert found.bits == 2 and found.levels.shape == (rows, 4) and found.integers() is None
    assert np.array_equal(found.values(), values)


def test_a_wrong_step_is_not_believed():
    values = (np.arange(4, dtype=np.float32) * np.float32(0.1)).repeat(50).reshape(2, 100)
    found = packed(values, np.array([0.1001], np.float32))
    assert found.step is None and np.array_equal(found.values(), values)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_has_no_levels_stays_float(value):
    random = np.random.RandomState(0).randn(8, 64).astype(np.float32)
    assert packed(random, np.ones(1, np.float32)) is None
    assert packed(np.full((8, 64), value, np.float32), None) is None


def test_arrays_that_do_not_fit_are_refused():
    arrays, about = packed(np.ones((4, 100), np.float32), np.ones(1, np.float32)).arrays("w")
    for changed in (
        {**arrays, "w#codes": arrays["w#codes"][:-1]},
        {k: v for k, v in arrays.items() if k != "w#step"},
        {**arrays, "w#step": np.ones(3, np.float32)},
        {**arrays, "w#step": np.ones(1, np.float64)},
    ):
        with pytest.raises(QexpError, match="do not fit"):
            Packed.of("w", changed, about)
