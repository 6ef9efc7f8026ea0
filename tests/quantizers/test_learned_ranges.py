"""LSQ+ and TQT: published vectors, and every gradient against numpy in float64 inside, on and outside each limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.errors import QexpError
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.lsq_plus import LSQPlus
from qexp.quantizers.tqt import TQT
from qexp.ranges import Fixed, MinMax
from qexp.statistics.stats import TensorStats
from tests.quantizers.learned import backward, fitted, put, upstream

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**16)


# -- LSQ+ --------------------------------------------------------------------------------------------------------------


def test_lsq_plus_vector():
    """V8.2-a."""
    q = fitted(LSQPlus(2, (5,), range=Fixed(-0.2, 0.7)), -0.2, 0.7)
    assert q.scale.item() == pytest.approx(0.3) and q.beta.item() == pytest.approx(-0.2)
    g = q.grad_scale
    values = [-0.5, 0.05, 0.8, 0.3, 2.2]
    assert q.codes(torch.tensor(values)).tolist() == [0, 1, 3, 2, 3]
    np.testing.assert_allclose(q(torch.tensor(values)).detach(), [-0.2, 0.1, 0.7, 0.4, 0.7], atol=1e-6)
    expected = zip(values, [0, 0.1666667, 3, 0.3333333, 3], [1, 0, 1, 0, 1], [0, 1, 0, 1, 0])
    for value, ds, dbeta, dx in expected:
        q.zero_grad()
        x = torch.tensor([value], requires_grad=True)
        q(x).sum().backward()
        assert q.scale.grad.item() == pytest.approx(ds * g, abs=1e-6)
        assert q.beta.grad.item() == pytest.approx(dbeta * g, abs=1e-6) and x.grad.item() == dx


@pytest.mark.parametrize(("bits", "s", "beta"), [(2, 0.25, -0.5), (3, 0.5, 0.25), (8, 0.125, -3.0)])
def test_lsq_plus_gradients(bits, s, beta):
    top = 2**bits - 1
    v = np.array([-4, -0.01, 0, 0.01, 0.3, 0.5, 1.5, 1.7, top - 0.3, top, top + 0.01, top + 9])
    x = v * s + beta
    q = fitted(LSQPlus(bits, x.shape, range=Fixed(-1, 1)), *x)
    put(q.scale, s), put(q.beta, beta)
    y, dx = backward(q, x)
    g, x = upstream(x.size), x.astype(np.float32).astype(np.float64)  # the numbers the quantizer saw
    v = (x - beta) / s
    inside = (v > 0) & (v < top)
    codes = np.rint(np.clip(v, 0, top))
    np.testing.assert_allclose(y, codes * s + beta, rtol=1e-6)
    np.testing.assert_allclose(dx, g * inside)
    factor = 1 / math.sqrt(x.size * top)
    ds = (g * np.where(inside, codes - v, codes)).sum() * factor
    assert q.scale.grad.item() == pytest.approx(ds, rel=1e-5, abs=1e-6)
    assert q.beta.grad.item() == pytest.approx((g * ~inside).sum() * factor, rel=1e-5, abs=1e-6)


def test_lsq_plus_weights_start_at_three_standard_deviations():
    w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    q = LSQPlus(4, tuple(w.shape), offset=False, signed=True)
    q.fit(TensorStats.of(w))
    mean, std = w.double().mean(), w.double().std()
    assert q.scale.item() == pytest.approx(float(max(abs(mean - 3 * std), abs(mean + 3 * std)) / 8), rel=1e-5)
    assert q.beta is None and q.zero_point.item() == 0


@few
@given(seed=seeds)
def test_lsq_plus_without_offset_at_zero_is_lsq_on_its_range(seed):
    """With beta = 0 an input that is never negative gives what LSQ gives."""
    from qexp.quantizers.lsq import LSQ

    x = np.abs(np.random.default_rng(seed).standard_normal((2, 3, 4, 4)))
    plus, plain = LSQPlus(3, (1, 3, 4, 4)), LSQ(3, (1, 3, 4, 4), signed=False)
    for q in (plus, plain):
        q.fit(TensorStats.of(torch.tensor(x, dtype=torch.float32)))
        put(q.scale, torch.full_like(q.scale, 0.2))
    put(plus.beta, torch.zeros_like(plus.beta))
    for one, other in zip(backward(plus, x), backward(plain, x)):
        np.testing.assert_array_equal(one, other)
    assert plus.scale.grad.item() == pytest.approx(plain.scale.grad.item(), rel=1e-5)


# -- TQT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "signed", "log2_t"), [(3, True, -0.3), (4, False, 1.2), (8, True, 0.0), (2, True, 2.9)]
)
def test_tqt_gradients(bits, signed, log2_t):
    s = 2.0 ** (math.ceil(log2_t) - (bits - 1 if signed else bits))
    low, top = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    v = np.array([low - 3, low - 0.51, low - 0.49, low, low + 0.3, 0.4, 0.5, top, top + 0.49, top + 0.51, top + 7])
    q = fitted(TQT(bits, v.shape, signed=signed, normed=False), 0.0, 1.0)
    put(q.log2_t, log2_t)
    y, dx = backward(q, v * s)
    g, codes = upstream(v.size), np.rint(v)
    inside = (codes >= low) & (codes <= top)
    np.testing.assert_array_equal(y, np.clip(codes, low, top) * s)
    np.testing.assert_array_equal(dx, g * inside)
    terms = np.where(inside, codes - v, np.where(codes < low, low, top))
    assert q.log2_t.grad.item() == pytest.approx((g * terms).sum() * s * math.log(2), rel=1e-5)
    np.testing.assert_array_equal(q.codes(torch.tensor(v * s)).double(), np.clip(codes, low, top))


def test_tqt_normed_gradients_have_length_one_at_most_whatever_the_tensor():
    q = fitted(TQT(4, (64,), signed=True), -1.0, 1.0)
    rng, found, square = np.random.default_rng(0), [], 0.0
    plain = fitted(TQT(4, (64,), signed=True, normed=False), -1.0, 1.0)
    for step in range(1, 6):
        x = rng.standard_normal(64) * 10
        q.zero_grad(), plain.zero_grad()
        backward(q, x), backward(plain, x)
        raw = plain.log2_t.grad.item()
        square = 0.999 * square + 0.001 * raw**2
        found.append(q.log2_t.grad.item())
        assert found[-1] == pytest.approx(math.tanh(raw / math.sqrt(square / (1 - 0.999**step))), rel=1e-4)
    assert max(map(abs, found)) <= 1
    q.eval()
    before = q.square.clone()
    backward(q, x)
    assert torch.equal(q.square, before), "evaluation leaves no trace"


def test_an_optimizer_step_at_most_halves_an_lsq_step():
    """A value on the limit of 8 bits pulls with 127: of few values that is several times the step itself."""
    q = LSQ(8, (3,), signed=True, narrow=True, range=MinMax())
    q.fit(TensorStats.of(torch.tensor([-0.5, 0.25, 1.27])))
    q.on_training_start(None, 10)
    for moved, left in ((0.012, 0.012), (-0.03, 0.006), (0.5, 0.5), (0.0, 0.25)):
        q.scale.data.fill_(moved)
        q.on_optimizer_step(None)
        assert q.scale.item() == pytest.approx(left) and bool((q.must_stay_positive() > 0).all())
    for broken in (torch.nan, torch.inf, -torch.inf):
        q.scale.data.fill_(broken)
        q.on_optimizer_step(None)
        assert not bool((torch.isfinite(q.must_stay_positive()) & (q.must_stay_positive() > 0)).all())
    q.fit(TensorStats.of(torch.tensor([-0.5, 0.25, 1.27])))
    q.on_training_start(None, 10)
    for _ in range(40):
        q.scale.data.fill_(-1.0)
        q.on_optimizer_step(None)
    assert not bool((q.must_stay_positive() > 0).all()), "a step that shrinks on and on has diverged"


@few
@given(seed=seeds, bits=st.integers(2, 8), step=st.floats(-3, 3))
def test_tqt_steps_stay_powers_of_two(seed, bits, step):
    x = np.random.default_rng(seed).standard_normal(20)
    q = fitted(TQT(bits, (20,), signed=True, range=MinMax()), *x)
    with torch.no_grad():
        q.log2_t += step
    q.on_optimizer_step(None)
    assert math.frexp(q.scale.item())[0] == 0.5
    assert q.scale.item() * 2 ** (bits - 1) >= 2.0 ** q.log2_t.item() * (1 - 1e-6)  # the range covers the threshold


def test_tqt_range_covers_what_the_rule_asks_for():
    for peak, expected in ((0.9, 1.0), (1.0, 1.0), (1.01, 2.0)):
        q = fitted(TQT(8, (2,), signed=True, range=MinMax()), -peak, peak / 2)
        assert q.scale.item() * 128 == expected


# -- what they refuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LSQPlus(4, (3,), range="wrong"), "range='wrong'; allowed are"),
        (lambda: LSQPlus(4, (3,), rounding="floor"), "half_even"),
        (lambda: TQT(4, (3,), rounding="half_up"), "half_even"),
    ],
)
def test_bad_options_are_refused(make, says):
    with pytest.raises(QexpError, match=says):
        make()


def test_an_offset_that_is_no_number_counts_as_diverged():
    q = LSQPlus(2, (2,), range=Fixed(-0.2, 0.7))
    q.fit(TensorStats.of(torch.tensor([-0.2, 0.7])))
    assert bool((q.must_stay_positive() > 0).all())
    q.beta.data.fill_(float("inf"))
    assert not q.must_stay_positive().isfinite().any()


def test_a_step_too_small_for_float32_is_its_smallest_normal_number():
    for q in (LSQ(6, (1, 1, 1, 1), signed=True), LSQPlus(6, (1, 1, 1, 1), offset=False)):
        q.init = MinMax()
        q.fit(TensorStats.of(torch.full((1, 1, 1, 1), -2e-44), q.granularity))
        assert q.scale.item() == torch.finfo(torch.float32).tiny
