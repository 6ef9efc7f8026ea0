"""LSQ+, TQT and APoT: published vectors, and every gradient against numpy in float64 inside, on and outside each limit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.calibration.ranges import Fixed, MinMax
from qexp.calibration.stats import TensorStats
from qexp.errors import QexpError
from qexp.numerics import PerChannel
from qexp.quantizers.apot import APoTInput, APoTWeight, magnitudes
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.lsq_plus import LSQPlus
from qexp.quantizers.tqt import TQT

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**16)


def upstream(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(-8, 9, n) / 8.0  # exact in float32


def backward(q: torch.nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the quantizer's values and the gradient of `sum(values * upstream)` to x; parameters get theirs."""
    t = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    y = q(t)
    (y * torch.tensor(upstream(x.size).reshape(x.shape), dtype=torch.float32)).sum().backward()
    return y.detach().double().numpy(), t.grad.double().numpy()


def fitted(q, *values: float):
    q.fit(TensorStats.of(torch.tensor(values), q.granularity))
    return q


def put(parameter: torch.Tensor, value) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value))


# -- LSQ+ --------------------------------------------------------------------------------------------------------------


def test_lsq_plus_vector():
    """V8.2-a."""
    q = fitted(LSQPlus(2, (5,), init=Fixed(-0.2, 0.7)), -0.2, 0.7)
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
    q = fitted(LSQPlus(bits, x.shape, init=Fixed(-1, 1)), *x)
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
    q = LSQ(8, (3,), signed=True, narrow=True, init=MinMax())
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
    q = fitted(TQT(bits, (20,), signed=True, init=MinMax()), *x)
    with torch.no_grad():
        q.log2_t += step
    q.on_optimizer_step(None)
    assert math.frexp(q.scale.item())[0] == 0.5
    assert q.scale.item() * 2 ** (bits - 1) >= 2.0 ** q.log2_t.item() * (1 - 1e-6)  # the range covers the threshold


def test_tqt_range_covers_what_the_rule_asks_for():
    for peak, expected in ((0.9, 1.0), (1.0, 1.0), (1.01, 2.0)):
        q = fitted(TQT(8, (2,), signed=True, init=MinMax()), -peak, peak / 2)
        assert q.scale.item() * 128 == expected


# -- APoT --------------------------------------------------------------------------------------------------------------

TERMS = {  # the sets of the paper's table, as fractions
    1: [[0, 1]],
    2: [[0, 1 / 2, 1 / 4, 1 / 8]],
    3: [[0, 1 / 2, 1 / 4, 1 / 16], [0, 1 / 8]],
    4: [[0, 1 / 2, 1 / 8, 1 / 32], [0, 1 / 4, 1 / 16, 1 / 64]],
    5: [[0, 1 / 2, 1 / 8, 1 / 64], [0, 1 / 4, 1 / 16, 1 / 128], [0, 1 / 32]],
    6: [[0, 1 / 2, 1 / 16, 1 / 128], [0, 1 / 4, 1 / 32, 1 / 256], [0, 1 / 8, 1 / 64, 1 / 512]],
}


@pytest.mark.parametrize("bits", TERMS)
def test_apot_levels(bits):
    """V8.3-a and the table."""
    sums = {sum(t) for t in itertools.product(*TERMS[bits])}
    expected = sorted(v / max(sums) for v in sums)
    assert len(expected) == 2**bits
    np.testing.assert_allclose(magnitudes(bits), expected, rtol=1e-12)
    if bits == 2:
        assert magnitudes(2) == [0, 0.25, 0.5, 1]


def test_plain_powers_of_two():
    assert magnitudes(3, additive=False) == [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]


def nearest(v: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns the level nearest to each value, the smaller magnitude where two are."""
    order = np.argsort(np.abs(levels), kind="stable")
    return levels[order][np.abs(v[:, None] - levels[order][None]).argmin(1)]


def test_apot_weight_vector():
    """V8.3-b; 1.05 / 1.5 is a tie which float64 sees an ulp above, so a value beyond it stands for it."""
    w = np.array([-2, -0.9, -0.33, 0, 0.1, 0.52, 1.0501, 1.4])
    q = fitted(APoTWeight(4, (8,), alpha_init=1.5, normalize=False), *w)
    for value, level, term in zip(
        w, [-1.5, -0.9, -0.3, 0, 0.15, 0.45, 1.2, 1.5], [-1, 0, 0.02, 0, 1 / 30, -7 / 150, 0.09993, 1 / 15]
    ):
        q.zero_grad()
        x = torch.tensor([value], dtype=torch.float32, requires_grad=True)
        y = q(x)
        y.sum().backward()
        assert y.item() == pytest.approx(level, abs=1e-6) and x.grad.item() == 1
        assert q.alpha.grad.item() == pytest.approx(term, abs=1e-5)


@pytest.mark.parametrize("rescale", ["std", "none"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_apot_weight_gradients_through_the_normalisation(bits, rescale):
    w = np.random.default_rng(bits).standard_normal((6, 5, 3, 3)) * 0.07 + 0.02
    q = APoTWeight(bits, w.shape, alpha_init=1.3, rescale=rescale)
    q.fit(TensorStats.of(torch.tensor(w, dtype=torch.float32)))
    y, dw = backward(q, w)
    w = w.astype(np.float32).astype(np.float64)
    mean, std = w.mean(), w.std(ddof=1)
    alpha = float(np.float32(1.3))
    v = ((w - mean) / std / alpha).ravel()
    positive = np.array(magnitudes(bits - 1))
    levels = np.concatenate([-positive[:0:-1], positive])
    q_levels = nearest(np.clip(v, -1, 1), levels)
    restored = std if rescale == "std" else 1.0
    np.testing.assert_allclose(y.ravel(), q_levels * alpha * restored, rtol=1e-5, atol=1e-8)
    g = upstream(w.size)
    np.testing.assert_allclose(dw.ravel(), g * restored / std, rtol=1e-5)  # not clipped: also beyond alpha
    assert (np.abs(v) > 1).any() and len(set(q_levels)) == len(levels)
    dalpha = (g * np.where(np.abs(v) > 1, np.sign(v), q_levels - v)).sum() * restored
    assert q.alpha.grad.item() == pytest.approx(dalpha, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_apot_input_gradients(bits, signed):
    alpha = 1.5
    rng = np.random.default_rng(bits)
    x = np.concatenate([[-9, -1.5, -1.4999, -0.2, 0, 0.2, 1.4999, 1.5, 1.5001, 9], rng.uniform(-2, 2, 50)])
    x = x.astype(np.float32).astype(np.float64)
    q = APoTInput(bits, x.shape, signed=signed, alpha_init=alpha)
    q.fit(TensorStats.of(torch.tensor(np.abs(x) if not signed else x, dtype=torch.float32)))
    y, dx = backward(q, x)
    positive = np.array(magnitudes(bits - 1 if signed else bits))
    levels = np.concatenate([-positive[:0:-1], positive]) if signed else positive
    v = x / alpha
    inside = (v >= levels[0]) & (v <= 1)
    found = nearest(np.clip(v, levels[0], 1), levels)
    np.testing.assert_allclose(y, found * alpha, rtol=1e-6)
    np.testing.assert_array_equal(dx, upstream(x.size) * inside)
    terms = np.where(inside, found - v, found)
    assert q.alpha.grad.item() == pytest.approx((upstream(x.size) * terms).sum(), rel=1e-4, abs=1e-5)


def test_apot_starts_at_the_clip_of_least_error():
    w = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.03
    q = APoTWeight(4, tuple(w.shape), alpha_init="mse")
    q.fit(TensorStats.of(w))
    chosen = q.alpha.item()

    def error(alpha: float) -> float:
        put(q.alpha, alpha)
        return float((q(w).detach() - (w - w.mean())).square().sum())

    best = min((error(a), a) for a in np.linspace(0.5, 4, 200))
    assert error(chosen) <= best[0] * 1.01


def test_apot_without_normalisation_warns(caplog):
    fitted(APoTWeight(3, (4,), normalize=False), -0.1, 0.2)
    assert "without weight normalisation" in caplog.text
    caplog.clear()
    fitted(APoTWeight(3, (4,)), -0.1, 0.2)
    assert not caplog.text


# -- what they refuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LSQPlus(4, (3,), init="wrong"), "init='wrong'; allowed are"),
        (lambda: LSQPlus(4, (3,), rounding="floor"), "half_even"),
        (lambda: TQT(4, (3,), rounding="half_up"), "half_even"),
        (lambda: APoTWeight(4, (3, 2), granularity=PerChannel(0)), "one clip for the whole tensor"),
        (lambda: APoTWeight(4, (3,), alpha_init=-1.0), "alpha_init=-1.0; allowed are mse or a positive number"),
        (lambda: APoTWeight(4, (3,), rescale="max"), "rescale='max'; allowed are std, none"),
        (lambda: APoTWeight(8, (3,)), "bits=8; allowed are 2..7"),
        (lambda: APoTInput(7, (3,)), "bits=7; allowed are 1..6"),
    ],
)
def test_bad_options_are_refused(make, says):
    with pytest.raises(QexpError, match=says):
        make()


def test_an_offset_that_is_no_number_counts_as_diverged():
    q = LSQPlus(2, (2,), init=Fixed(-0.2, 0.7))
    q.fit(TensorStats.of(torch.tensor([-0.2, 0.7])))
    assert bool((q.must_stay_positive() > 0).all())
    q.beta.data.fill_(float("inf"))
    assert not q.must_stay_positive().isfinite().any()


def test_a_step_too_small_for_float32_is_its_smallest_normal_number():
    for q in (LSQ(6, (1, 1, 1, 1), signed=True), LSQPlus(6, (1, 1, 1, 1), offset=False)):
        q.init = MinMax()
        q.fit(TensorStats.of(torch.full((1, 1, 1, 1), -2e-44), q.granularity))
        assert q.scale.item() == torch.finfo(torch.float32).tiny
