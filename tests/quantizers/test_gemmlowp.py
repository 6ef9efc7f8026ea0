"""GEMMLOWP: published vectors, options, ranges without width, channels of few and of no bits."""

import copy
import logging

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import PerChannel, UniformGrid
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.ranges import Clip, Fixed, MinMax
from qexp.statistics.stats import TensorStats

X = (-1, -0.4, 0, 0.25, 0.55, 2)
TIES = (0.25, 0.75, 1.25, -0.25)


def over(low: float, high: float, x: tuple[float, ...], bits: int, **options) -> tuple[GEMMLOWP, torch.Tensor]:
    t = torch.tensor(x)
    q = GEMMLOWP(bits, (len(x),), range=Fixed(low, high), **options)
    q.fit(TensorStats.of(t))
    return q, t


@pytest.mark.parametrize(
    ("low", "high", "x", "bits", "options", "scale", "zero", "codes"),
    [
        (-1, 2, X, 4, {}, 0.2, 5, (0, 3, 5, 6, 8, 15)),  # V1.1-a
        (-1.5, 6, TIES, 4, {}, 0.5, 3, (4, 4, 6, 2)),  # V1.1-b
        (-1.5, 6, TIES, 4, {"rounding": "half_away"}, 0.5, 3, (4, 5, 6, 3)),
        (2, 3, (2, 2.45, 3), 4, {"zero_point": "unclamped"}, 1 / 15, -30, (0, 7, 15)),  # V1.1-c
        (-1, 2, X, 4, {"pow2_scale": True}, 0.25, 4, (0, 2, 4, 5, 6, 12)),  # V1.1-d
        (0.37, 1.6, (0.37, 0.9, 1.6), 3, {"preserve_zero": False}, 1.23 / 7, 0, (0, 3, 7)),  # V1.1-e
    ],
)
def test_published_vectors(low, high, x, bits, options, scale, zero, codes):
    q, t = over(low, high, x, bits, **options)
    assert q.scale.item() == pytest.approx(scale, rel=1e-6) and q.zero_point.item() == zero
    assert tuple(q.codes(t).tolist()) == codes
    assert q.levels == 2**bits and torch.equal(q.dequantize(q.codes(t)), q(t))


def test_values_of_the_vectors():
    q, t = over(2, 3, (2, 2.45, 3), 4, zero_point="unclamped")
    torch.testing.assert_close(q(t), torch.tensor([2, 2.466667, 3]), atol=1e-6, rtol=0)
    q, t = over(0.37, 1.6, (0.37, 0.9, 1.6), 3, preserve_zero=False)
    torch.testing.assert_close(q(t), torch.tensor([0.37, 0.8971429, 1.6]), atol=1e-6, rtol=0)


def test_a_clamped_zero_point_extends_the_range_to_zero():
    q, _ = over(2, 3, (2, 2.45, 3), 4)
    assert q.zero_point.item() == 0 and q.scale.item() == pytest.approx(0.2)
    q, _ = over(-3, -2, (-2, -2.45, -3), 4)
    assert q.zero_point.item() == 15 and q(torch.zeros(1)).item() == 0


def test_zero_is_kept_only_where_it_lies_inside():
    assert over(-1, 2, X, 4, preserve_zero="inside")[0].zero_point.item() == 5
    q, t = over(2, 3, (2, 2.45, 3), 4, preserve_zero="inside", zero_point="unclamped")
    assert q.shift.item() == 2 and q.codes(t).tolist() == [0, 7, 15]


def test_gradient_is_one_inside_the_limits_and_zero_outside():
    q, _ = over(-1, 2, X, 4)
    x = torch.tensor([-1.1, -1.0, 0.3, 2.0, 2.1], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("options", [{"noise": "uniform"}, {"rounding": "stochastic"}])
def test_noise_is_seeded_unbiased_and_stays_on_the_grid(options):
    q, _ = over(-1, 2, X, 4, **options)
    x = torch.full((20000,), 0.33)
    torch.manual_seed(3)
    y = q(x)
    torch.manual_seed(3)
    assert torch.equal(q.dequantize(q.codes(x)), y)
    assert set((y / 0.2).round().int().tolist()) == {1, 2} and y.mean().item() == pytest.approx(0.33, abs=5e-3)
    assert not q.properties & {"idempotent", "half_step", "monotone"}


def test_noise_twice_is_refused():
    with pytest.raises(QexpError, match="noise twice"):
        GEMMLOWP(4, noise="uniform", rounding="stochastic")


@pytest.mark.parametrize("wrong", ["zero_point", "preserve_zero", "noise", "ranges", "zero_bit"])
def test_unknown_options_are_refused_by_name(wrong):
    with pytest.raises(QexpError, match=rf"GEMMLOWP\({wrong}='maybe'\): allowed are"):
        GEMMLOWP(4, **{wrong: "maybe"})


@pytest.mark.parametrize("options", [{}, {"zero_point": "unclamped"}, {"preserve_zero": False}])
def test_a_constant_channel_passes_unchanged_and_is_logged(options, caplog):
    w = torch.tensor([[0.37, 0.37], [0.0, 0.0], [-1.0, 1.0]])
    q = GEMMLOWP(4, (3, 2), granularity=PerChannel(0), **options)
    with caplog.at_level(logging.INFO):
        q.fit(TensorStats.of(w, PerChannel(0)))
    assert "degenerate_range: 2 of 3 channels" in caplog.text
    assert torch.equal(q(w)[:2], w[:2]) and torch.equal(q.dequantize(q.codes(w)), q(w))
    fresh = GEMMLOWP(4, (3, 2), granularity=PerChannel(0), **options)
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(w), q(w))


def test_channels_take_their_own_widths_and_none_becomes_a_constant():
    torch.manual_seed(0)
    w = torch.randn(4, 500)
    for zero_bit, value in (("mean", w[0].mean()), ("offset", w[0].min())):
        q = GEMMLOWP(4, (4, 500), granularity=PerChannel(0), zero_bit=zero_bit)
        q.set_grid(UniformGrid(torch.tensor([0, 1, 3, 8]), signed=False))
        q.fit(TensorStats.of(w, PerChannel(0)))
        y = q(w)
        used = [len(row.unique()) for row in y]
        assert used[:3] == [1, 2, 8] and 100 < used[3] <= 256
        assert y[0, 0].item() == pytest.approx(value.item(), abs=1e-6)
        assert torch.equal(q.dequantize(q.codes(w)), y) and q.levels == 256
        again = GEMMLOWP(4, (4, 500), granularity=PerChannel(0), zero_bit=zero_bit)
        again.load_state_dict(copy.deepcopy(q.state_dict()))
        assert torch.equal(again(w), y)


def test_a_constant_for_no_bits_is_what_the_relu_leaves():
    x = torch.tensor([-1.0, 3.0, 1.0, -3.0]).reshape(4, 1, 1, 1)
    seen = TensorStats(PerChannel(1))
    seen.update(x)
    q = GEMMLOWP(4, (1, 1, 1, 1), granularity=PerChannel(1), range=Clip("laplace"))
    q.set_grid(UniformGrid(torch.tensor([0]), signed=False))
    q.fit(seen, followed_by_relu=True)
    assert q(x).unique().tolist() == [1.0]  # mean of 0, 3, 1, 0


def test_half_range_does_the_relu():
    x = torch.linspace(-2, 2, 41).reshape(1, 1, 41)
    q = GEMMLOWP(8, (1, 1, 41), granularity=PerChannel(1), range=Clip("none"))
    seen = TensorStats(PerChannel(1))
    seen.update(x)
    q.fit(seen, followed_by_relu=True)
    assert q.zero_point.item() == 0 and (q(x)[x <= 0] == 0).all()
    torch.testing.assert_close(q(x), x.relu(), atol=2 / 255, rtol=0)


def test_dynamic_ranges_follow_the_batch():
    small, large = torch.linspace(-1, 1, 100), torch.linspace(-50, 50, 100)
    q = GEMMLOWP(8, (100,), ranges="dynamic", range=MinMax())
    q.fit(TensorStats.of(small))
    for x in (small, large, small):
        y = q(x)
        assert (y - x).abs().max() <= 0.51 * (x.max() - x.min()) / 255
        assert torch.equal(q.dequantize(q.codes(x)), y)
    static = GEMMLOWP(8, (100,), range=MinMax())
    static.fit(TensorStats.of(small))
    assert static(large).max() < 1.01


def test_correction_changes_values_not_codes():
    w = torch.tensor([[0.9, -0.31], [0.12, 0.47]])
    q = GEMMLOWP(4, (2, 2), granularity=PerChannel(0))
    q.fit(TensorStats.of(w, PerChannel(0)))
    before, codes = q(w), q.codes(w)
    gain, offset = torch.tensor([[1.5], [1.0]]), torch.tensor([[0.25], [-0.5]])
    q.correct(gain, offset)
    assert torch.equal(q.codes(w), codes) and torch.equal(q(w), before * gain + offset)
    assert torch.equal(q.dequantize(codes), q(w))
    fresh = GEMMLOWP(4, (2, 2), granularity=PerChannel(0))
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(w), q(w))
    fresh.fit(TensorStats.of(w, PerChannel(0)))
    assert fresh.gain is None and torch.equal(fresh(w), before), "a new range drops the correction of the old"
