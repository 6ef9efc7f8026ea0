"""`fixed_type` and residual sums: published vectors, both forms, and what is refused."""

from __future__ import annotations

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics.fixed_type import fixed_type, shifted


@pytest.mark.parametrize(
    ("x", "saturate", "split"), [(3.14159, 3217, 3217), (0.0007, 1, 1), (40.2, 32767, 31949), (31.9, 32666, 31642)]
)
def test_vectors(x, saturate, split):
    assert int(fixed_type(x, 16, 6)) == saturate
    assert int(fixed_type(x, 16, 6, "split")) == split


def test_saturate_ends_where_the_type_does_and_split_leaves_it():
    x = torch.tensor([-1e9, -32.0, -31.99, 31.999, 1e9], dtype=torch.float64)
    inside = fixed_type(x, 16, 6)
    assert inside.tolist() == [-32768, -32768, -32758, 32767, 32767] and inside.dtype == torch.int64
    assert int(fixed_type(-32.4, 16, 6, "split")) < -32768


def test_fractions_of_32_bits_are_exact():
    x = torch.tensor([1 + 2.0**-30, -1 - 2.0**-30], dtype=torch.float64)
    assert fixed_type(x, 32, 2).tolist() == [2**30 + 1, -(2**30) - 1]


@pytest.mark.parametrize(("bit", "intbit"), [(16, 0), (8, 9), (64, 2), (True, True)])
def test_types_that_do_not_exist_are_refused(bit, intbit):
    with pytest.raises(QexpError, match="allowed are 1 <= intbit <= bit <= 48"):
        fixed_type(1.0, bit, intbit)


def test_bad_constants_and_forms_are_refused():
    with pytest.raises(QexpError, match="1 constants are NaN or infinite"):
        fixed_type(torch.tensor([1.0, torch.nan]), 16, 6)
    with pytest.raises(QexpError, match="form='wrap'"):
        fixed_type(1.0, 16, 6, "wrap")


def test_shift_goes_toward_zero():
    total = torch.tensor([-7, -8, -9, 7, 9])
    assert shifted(total, 2).tolist() == [-1, -2, -2, 1, 2]
    assert shifted(total, 2, "half_even").tolist() == [-2, -2, -2, 2, 2]


def test_residual_vector():
    """A residual sum of PACT-Quantization: both operands rescaled, added, shifted toward zero, clipped to 8 bits."""
    ours, theirs = fixed_type(0.0042, 32, 16), fixed_type(0.63, 32, 16)
    assert (int(ours), int(theirs)) == (275, 41288)
    totals = torch.tensor([8190, 10**6, -(10**6)]) * ours + torch.tensor([-37, 0, 0]) * theirs
    assert shifted(totals, 16).clamp(-128, 127).tolist() == [11, 127, -128]
