"""Large linear layers: bounds and integers of a weight come from parts of it, and are those of the whole weight."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch

from qexp.integer import bounds, grids, int8
from qexp.integer.bounds import by_input, by_output
from qexp.integer.grids import integer_weight
from qexp.integer.program import Linear
from qexp.numerics import packing
from qexp.numerics.granularity import PerChannel, PerGroup, PerTensor
from qexp.numerics.packing import pack, unpack
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


def naive(weight: np.ndarray, zero: np.ndarray, groups: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    outputs, per = weight.shape[:2]
    zero = np.broadcast_to(zero, (per * groups,)).reshape(groups, per)
    least, most = np.zeros((2, outputs), np.int64)
    for o in range(outputs):
        for i in range(per):
            ends = min(low - zero[o // (outputs // groups), i], 0), max(high - zero[o // (outputs // groups), i], 0)
            for w in weight[o, i].ravel():
                least[o] += min(w * ends[0], w * ends[1])
                most[o] += max(w * ends[0], w * ends[1])
    return least, most


@pytest.mark.parametrize("room", [7, 2**20])
@pytest.mark.parametrize(("shape", "groups"), [((6, 35), 1), ((6, 4, 3, 2), 1), ((6, 2, 3, 3), 3), ((4, 1, 3, 3), 4)])
def test_bounds_of_parts_are_those_of_the_whole(shape, groups, room, monkeypatch):
    monkeypatch.setattr(bounds, "ROOM", room)
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, shape)
    for zero in (np.zeros(1, np.int64), np.array([130]), rng.integers(0, 255, shape[1] * groups)):
        expected = naive(weight, zero, groups, 3, 250)
        for got, wanted in zip(by_output(weight, zero, groups, 3, 250), expected):
            assert np.array_equal(got, wanted)
        for got, wanted in zip(by_input(weight, zero, groups, 3, 250, 16), expected):
            assert got.shape == (shape[0], -(-shape[1] // 16)) and np.array_equal(got.sum(1), wanted)


def test_parts_on_bytes_are_as_long_as_float32_allows():
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (3, 2500))
    op = Linear(layer="l", inputs=("x",), output="y", weight=weight, bias=np.zeros(3, np.int64), zero=np.array([7]))
    parts = int8._parts(op, 0, 255)

    def fits(first: int, last: int) -> bool:
        least, most = naive(weight[:, first:last], op.zero, 1, 0, 255)
        return max(-least.min(), most.max()) < 2**24

    assert len(parts) > 1 and parts[0][0] == 0 and parts[-1][1] == 2500
    for (first, last), (after, _) in itertools.pairwise(parts):
        assert last == after and fits(first, last) and not fits(first, last + 16)


def test_bounds_take_less_memory_than_the_weight():
    weight = np.random.default_rng(0).integers(-127, 128, (512, 16384))
    tracemalloc.start()
    by_output(weight, np.array([128]), 1, 0, 255)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < weight.nbytes


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(8)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_parts_are_those_of_the_whole(granularity, symmetric, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(16, 8) * torch.linspace(0.1, 3, 16)[:, None] + 0.1
    quantizer = Uniform(5, (16, 8), granularity=granularity, symmetric=symmetric)
    quantizer.fit(TensorStats.of(weight, granularity))
    found = []
    for room in (1, 64, 2**20):
        monkeypatch.setattr(grids, "ROOM", room)
        found.append(integer_weight(weight, quantizer, "l.weight", 255))
    whole, unit = found[0]
    for other, step in found[1:]:
        assert np.array_equal(other, whole) and np.array_equal(step, unit)
    real = quantizer(weight).detach().double().numpy()
    assert np.abs(whole * unit[:, None] - real).max() < 1e-3 * unit.max()


@pytest.mark.parametrize("bits", [1, 3, 8, 11])
@pytest.mark.parametrize("count", [0, 1, 8, 61])
def test_packing_in_parts_changes_no_byte(bits, count, monkeypatch):
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "AT_A_TIME", 8)
    assert pack(codes, bits) == whole
    assert np.array_equal(unpack(whole, count, bits, True), codes)
    assert np.array_equal(unpack(whole, count, bits, False), codes % 2**bits)
