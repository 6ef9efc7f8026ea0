"""Which codes a width has."""

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import LevelGrid, UniformGrid


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_the_three_grids(bits):
    assert (UniformGrid(bits, False).qmin, UniformGrid(bits, False).qmax) == (0, 2**bits - 1)
    signed, narrow = UniformGrid(bits, True), UniformGrid(bits, True, narrow=True)
    assert (signed.qmin, signed.qmax, signed.levels) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2**bits)
    assert (narrow.qmin, narrow.qmax, narrow.levels) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2**bits - 1)


def test_zero_bits_are_the_single_code_zero():
    for grid in (UniformGrid(0, False), UniformGrid(0, True), UniformGrid(0, True, True)):
        assert (grid.qmin, grid.qmax, grid.levels) == (0, 0, 1)


def test_channels_may_differ():
    grid = UniformGrid(torch.tensor([0, 1, 2, 4, 8]), signed=False)
    assert grid.qmax.tolist() == [0, 1, 3, 15, 255] and grid.qmin.tolist() == [0] * 5
    assert UniformGrid(torch.tensor([2, 4]), True).qmin.tolist() == [-2, -8]


@pytest.mark.parametrize(("bits", "narrow"), [(32, False), (-1, False), (1, True)])
def test_a_width_without_a_grid_is_refused(bits, narrow):
    with pytest.raises(QexpError, match=rf"bits={bits}.*allowed are {2 if narrow else 1}\.\.31"):
        UniformGrid(bits, True, narrow)


def test_level_grids_are_ascending_and_distinct():
    grid = LevelGrid((-1.0, 0.0, 0.5))
    assert (grid.qmin, grid.qmax, grid.levels, grid.signed) == (0, 2, 3, True)
    for bad in ((), (1.0, 0.5), (0.0, 0.0)):
        with pytest.raises(QexpError, match="distinct ascending"):
            LevelGrid(bad)
