"""Bits for each channel: the vectors, the budget, degenerate channels, and the pass on a network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.layers.swap import swap
from qexp.network.facts import Facts, facts
from qexp.numerics import PerChannel
from qexp.numerics.bins import bins
from qexp.passes.base import PassContext
from qexp.passes.bit_allocation import BitAllocation, allocate
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.quantizers.uniform import Uniform
from qexp.ranges import Clip

A, C, D = (1, 2, 4, 8), (2.82845653294, 1), (0.02, 5, 1)


def test_bins():
    """V2.1-a, V2.8-a."""
    expected = [7.027374, 11.155260, 17.707872, 28.109494]
    assert bins(torch.tensor(A), 4).tolist() == pytest.approx(expected, abs=1e-5)
    assert bins(torch.tensor([1, 2, 0.25]), 2).tolist() == pytest.approx([4.021109, 6.383113, 1.595778], abs=1e-6)


@pytest.mark.parametrize(
    ("spread", "bits", "options", "expected"),
    [
        (A, 4, {"target": "plain"}, (3, 3, 4, 5)),
        (A, 4, {"target": "plain", "rounding": "ceil"}, (3, 4, 5, 5)),
        (A, 4, {}, (3, 4, 4, 5)),
        ((8, 1), 4, {}, (5, 3)),  # V2.1-b
        (C, 4, {"target": "plain"}, (4, 3)),  # V2.1-c
        (C, 4, {"guard": "none"}, (5, 4)),
        (C, 4, {}, (5, 3)),
        (D, 2.5, {"target": "plain"}, (0, 4, 2)),  # V2.1-d
        (D, 2.5, {"guard": "none"}, (0, 5, 3)),
        (D, 2.5, {}, (0, 4, 3)),
    ],
)
def test_the_vectors(spread, bits, options, expected):
    assert tuple(allocate(torch.tensor(spread, dtype=torch.float64), bits, **options).tolist()) == expected


@settings(max_examples=200, deadline=None)
@given(
    spread=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40),
    bits=st.one_of(st.integers(1, 8), st.floats(0.5, 8)),
    rounding=st.sampled_from(["round", "ceil"]),
)
def test_the_guard_meets_the_budget_and_never_exceeds_it(spread, bits, rounding):
    found = allocate(torch.tensor(spread, dtype=torch.float64), bits, rounding=rounding)
    total = int(found.sum())
    assert found.min() >= 0 and found.max() <= 8
    assert total <= len(spread) * bits + 1e-6
    assert total >= len(spread) * (bits - 0.01) - 1 or (found == 8).any()


def test_wider_channels_never_get_fewer_bits():
    torch.manual_seed(0)
    spread = torch.rand(64).exp().sort().values
    assert (allocate(spread, 3).diff() >= 0).all()


def test_constant_tensors_share_evenly():
    assert allocate(torch.zeros(5), 3).tolist() == [3] * 5
    assert allocate(torch.tensor([0.0, 1.0]), 2).tolist()[0] == 0


def network() -> tuple[torch.nn.Sequential, Facts]:
    """A convolution before a ReLU, one without, and a classifier of 8 bits; channels of very different spread."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3), torch.nn.Flatten(), torch.nn.Linear(96, 5)
    )
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 1, 8).reshape(-1, 1, 1, 1))
        net[2].weight[0] = 0
    structure = facts(net, torch.zeros(1, 3, 8, 8))
    for layer, bits in ((net[0], 3), (net[2], 3), (net[4], 8)):
        own = PerChannel(0)
        swap(
            layer,
            {
                "weight": GEMMLOWP(bits, tuple(layer.weight.shape), granularity=own),
                "output": GEMMLOWP(
                    bits, SHAPES[layer.__class__, layer.weight.shape[0]], granularity=PerChannel(1), range=Clip()
                ),
            },
        )
    return net.eval(), structure


SHAPES = {
    (torch.nn.Conv2d, 8): (1, 8, 6, 6),
    (torch.nn.Conv2d, 6): (1, 6, 4, 4),
    (torch.nn.Linear, 5): (1, 5),
}


def fitted(net: torch.nn.Module, structure: Facts, **options) -> PassContext:
    torch.manual_seed(1)
    images = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    context = PassContext(structure, images, {})

    def allocation(seen) -> None:
        context.calibration = seen
        BitAllocation(**options).on_statistics(net, context)

    calibrate(net, images, followed_by_relu=structure.followed_by_relu, progress=False, before_fit=allocation)
    return context


def test_a_network_gets_widths_by_channel_and_keeps_its_wide_layers():
    net, structure = network()
    context = fitted(net, structure)
    by_key = {(name, site): q for name, site, q in quantizers(net)}
    first = by_key["0", "weight"].grid.bits.flatten()
    assert first.double().mean() == 3 and first[0] < first[-1] and first.max() <= 8
    assert by_key["2", "weight"].grid.bits.flatten()[0] == 0, "an all-zero channel needs no bits"
    assert by_key["4", "weight"].grid.bits == 8, "wider than widest: as it was"
    assert context.findings["allocated_bits_weight"] == 3 and context.findings["allocated_bits_output"] <= 3
    assert context.findings["allocation_missed"] == []
    x = torch.randn(4, 3, 8, 8)
    y = net(x)
    assert torch.isfinite(y).all()
    codes = by_key["0", "output"].codes(torch.randn(4, 8, 6, 6) * 100)
    bits = by_key["0", "output"].grid.bits
    assert (codes.amax((0, 2, 3)) <= 2 ** bits.flatten() - 1).all()


def test_state_with_widths_by_channel_loads_into_a_fresh_network():
    net, structure = network()
    fitted(net, structure)
    fresh, _ = network()
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(fresh(x), net(x))


def test_fractional_targets_by_site():
    net, structure = network()
    context = fitted(net, structure, bits={"output": 2.5}, prior="laplace")
    assert context.findings["allocated_bits_output"] == 2.5 and context.findings["allocated_bits_weight"] == 3


def test_nothing_to_serve_is_an_error():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    structure = facts(net, torch.zeros(1, 3, 8, 8))
    swap(net[0], {"weight": Uniform(3, (4, 3, 3, 3), signed=True, granularity=PerChannel(0))})
    with pytest.raises(QexpError, match="unsigned grid"):
        BitAllocation().on_statistics(net, PassContext(structure, [], {}))


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "up"},
        {"guard": "dog"},
        {"prior": "x"},
        {"target": "y"},
        {"sites": ["bias"]},
        {"bits": {"weight": 9}},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(QexpError, match="BitAllocation"):
        BitAllocation(**options)
