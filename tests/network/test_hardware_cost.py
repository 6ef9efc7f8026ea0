"""Estimates of hardware cost against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.layers import swap
from qexp.models.modules import Add
from qexp.network.cost import LayerCost, cost, layer_costs
from qexp.network.facts import facts
from qexp.network.hardware_cost import activation_bytes_peak, dsp_cycles, hardware, mac_energy, read_energy
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.uniform import Uniform

LAYER = {"a": LayerCost(weights=100, macs=1001, inputs=50)}


class Chain(nn.Module):
    """conv 1->4 (8x8), BN, ReLU, conv 4->4, skip around it, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.two, self.add, self.fc = nn.Conv2d(4, 4, 3, padding=1), Add(), nn.Linear(256, 10)

    def forward(self, x):
        x = self.relu(self.bn(self.one(x)))
        return self.fc(self.add(self.two(x), x).flatten(1))


@pytest.mark.parametrize(
    ("w", "a", "picojoules"), [(8, 8, 0.3), (4, 4, 0.15), (1, 1, 0.103125), (16, 8, 0.5), (32, 8, 4.6), (8, 32, 4.6)]
)
def test_energy_of_a_multiply_accumulate(w, a, picojoules):
    assert mac_energy(w, a) == pytest.approx(picojoules)


def test_a_layer_called_again_costs_again():
    """A head that several levels share: 8x8, 4x4 and 2x2 positions, its weights once."""

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.pool, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), nn.Linear(4, 10)

        def forward(self, x):
            levels = [x, self.pool(x), self.pool(self.pool(x))]
            return sum(self.fc(self.head(level).mean((2, 3))) for level in levels)

    model = Levels().eval()
    costs = layer_costs(model, facts(model, torch.zeros(2, 4, 8, 8)))
    positions = 64 + 16 + 4
    assert costs["head"] == LayerCost(weights=144, macs=144 * positions, inputs=4 * positions)
    assert costs["fc"] == LayerCost(weights=40, macs=3 * 40, inputs=3 * 4)
    assert cost(costs, {"head": 4, "fc": 8}, {"head": 2, "fc": 8}, 0).bops == 144 * positions * 8 + 120 * 64


def test_energy_of_reading():
    assert read_energy(LAYER, {"a": 4}, {"a": 8}) == pytest.approx((400 + 400) * 20 / 64)


@pytest.mark.parametrize(("w", "a", "cycles"), [(4, 4, 251), (4, 5, 501), (8, 8, 501), (16, 8, 1001), (32, 8, None)])
def test_products_share_a_slice(w, a, cycles):
    assert dsp_cycles(LAYER, {"a": w}, {"a": a}) == cycles


def test_peak_of_a_residual_block():
    """While `two` runs, its input (read by the add in float: 32 bits) and its result are there: 256 elements each."""
    structure = facts(Chain().eval(), torch.zeros(3, 1, 8, 8))
    assert activation_bytes_peak(structure, {}, {}) == 4 * (256 + 256 + 256), "add: both operands and the sum"
    quantized = dict.fromkeys(("one", "two", "fc", "add"), 8)
    assert activation_bytes_peak(structure, quantized, {}) == 3 * 256
    floating_skip = {"one": 8, "two": 8, "fc": 8}
    assert activation_bytes_peak(structure, floating_skip, {}) == 4 * 256 + 4 * 256 + 256
    assert activation_bytes_peak(structure, floating_skip, {"bn": 4, "two": 8}) == 128 + 256 + 256


def test_the_peak_knows_each_operand():
    """The skip is read at 8 and by the add at 4 bits, the convolution's result by the add alone."""
    structure = facts(Chain().eval(), torch.zeros(1, 1, 8, 8))
    layers = {"one": 8, "two": 8, "fc": 8}
    operands = {("add", 0): 2, ("add", 1): 4}
    assert activation_bytes_peak(structure, layers, {}, operands) == 64 + 256 + 256
    assert activation_bytes_peak(structure, layers, {}, {("add", 0): 2}) == 64 + 4 * 256 + 256, "the skip in float"


def test_peak_without_a_trace():
    class Untraceable(Chain):
        def forward(self, x):
            return super().forward(x if float(x.sum()) >= 0 else -x)

    structure = facts(Untraceable().eval(), torch.zeros(1, 1, 8, 8))
    assert structure.trace_error
    assert activation_bytes_peak(structure, {}, {}) >= 4 * (256 + 256)


def test_bytes_with_scales_and_biases():
    model = Chain().eval()
    structure = facts(model, torch.zeros(1, 1, 8, 8))
    swap(model.two, {"weight": Uniform(3, (4, 4, 3, 3), granularity=PerChannel(0))})
    columns = hardware(model, structure, {"two": 3}, {}, {})
    assert columns["packed_bytes"] == (36 + 4) * 4 + (54 + 4 * 4 + 4 * 4) + (2560 + 10) * 4
    assert columns["dsp_cycles"] is None and columns["energy_mac_uj"] == pytest.approx(
        4.6e-6 * (64 * 36 + 64 * 144 + 2560)
    )


def test_the_peak_of_a_run_has_the_bits_of_its_adds(run):
    """Eight channels of 8x8 enter the add twice and leave it: all at 8 bits, or in float around it."""
    assert run("study=s", "quant=caq_simple", "bits=w8a8")["activation_bytes_peak"] == 3 * 512
    floating = ("+quant.rules.adds.input.bits=32", "bits=w8a8")
    assert run("study=s", "quant=caq_simple", *floating)["activation_bytes_peak"] == 4 * 512 * 2 + 512


def test_columns_of_a_run(run):
    eight, four = run("study=s", "bits=w8a8"), run("study=s", "bits=w4a4")
    for name in ("packed_bytes", "energy_mac_uj", "energy_read_uj", "dsp_cycles", "activation_bytes_peak"):
        assert 0 < four[name] < eight[name], name
    assert eight["packed_bytes"] > eight["weight_bytes"]
