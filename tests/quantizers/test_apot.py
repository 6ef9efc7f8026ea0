"""APoT: published levels and vectors, and every gradient against numpy in float64 inside, on and outside each limit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from qexp.errors import QexpError
from qexp.numerics import PerChannel
from qexp.quantizers.apot import APoTInput, APoTWeight, magnitudes
from qexp.statistics.stats import TensorStats
from tests.quantizers.learned import backward, fitted, put, upstream

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**16)


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
    q = fitted(APoTWeight(4, (8,), range=1.5, normalize=False), *w)
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
    q = APoTWeight(bits, w.shape, range=1.3, rescale=rescale)
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
    q = APoTInput(bits, x.shape, signed=signed, range=alpha)
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
    q = APoTWeight(4, tuple(w.shape), range="mse")
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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: APoTWeight(4, (3, 2), granularity=PerChannel(0)), "granularity=channel is not allowed; use tensor"),
        (lambda: APoTWeight(4, (3,), range=-1.0), "range=-1.0; allowed are mse or a positive number"),
        (lambda: APoTWeight(4, (3,), rescale="max"), "rescale='max'; allowed are std, none"),
        (lambda: APoTWeight(8, (3,)), "bits=8; allowed are 2..7"),
        (lambda: APoTInput(7, (3,)), "bits=7; allowed are 1..6"),
    ],
)
def test_bad_options_are_refused(make, says):
    with pytest.raises(QexpError, match=says):
        make()
