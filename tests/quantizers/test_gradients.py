"""Gradients against the papers' closed forms, computed apart from the code, at points inside, on and outside each limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qexp.numerics import PerChannel
from qexp.quantizers.dorefa import DoReFaInput, DoReFaWeight
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.pact import PACT
from qexp.quantizers.uniform import Uniform
from qexp.ranges import Fixed
from qexp.statistics.stats import TensorStats

UPSTREAM = np.array([0.7, -1.3, 0.4, 2.0, -0.9, 1.1, 0.3, -0.6, 1.7, -0.2, 0.8])


def backward(quantizer: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    t = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    (quantizer(t) * torch.tensor(UPSTREAM[: len(x)], dtype=torch.float32)).sum().backward()
    return t.grad.double().numpy()


def fitted(quantizer, x: np.ndarray):
    quantizer.fit(TensorStats.of(torch.tensor(x, dtype=torch.float32)))
    return quantizer


@pytest.mark.parametrize("signed", [False, True])
def test_pact(signed):
    alpha = 1.5
    x = np.array([-9, -1.5, -1.4999, -0.2, 0, 0.2, 0.7, 1.4999, 1.5, 1.5001, 9])
    q = fitted(PACT(4, (11,), signed=signed, range=alpha), x)
    dx = backward(q, x)
    low = -alpha if signed else 0.0
    np.testing.assert_allclose(dx, UPSTREAM * ((x >= low) & (x <= alpha)), rtol=1e-6)
    dalpha = (UPSTREAM * ((x >= alpha) * 1.0 - (x <= -alpha) * float(signed))).sum()
    assert q.alpha.grad.item() == pytest.approx(dalpha, rel=1e-5)


def test_pact_with_a_fixed_clip_learns_nothing():
    q = fitted(PACT(4, (11,), signed=False, range=1.5, learned=False), np.ones(11))
    backward(q, np.linspace(-1, 3, 11))
    assert not q.alpha.requires_grad and q.alpha.grad is None


@pytest.mark.parametrize(("bits", "signed"), [(3, True), (3, False), (2, False), (8, True)])
def test_lsq(bits, signed):
    s = 0.25
    qn, qp = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    v = np.array([-qn - 3, -qn - 0.01, -qn, -qn + 0.3, -0.4, 0.0, 0.6, qp - 0.3, qp, qp + 0.01, qp + 5])
    q = fitted(LSQ(bits, (11,), signed=signed), np.maximum(v, 0 if not signed else -np.inf) * s)
    with torch.no_grad():
        q.scale.fill_(s)
    dx = backward(q, v * s)  # s is a power of two, so the limits are hit exactly
    inside = (v > -qn) & (v < qp)
    np.testing.assert_allclose(dx, UPSTREAM * inside, rtol=1e-6)
    terms = np.where(inside, np.rint(v) - v, np.where(v <= -qn, -qn, qp))
    g = 1 / math.sqrt(11 * qp)
    assert q.scale.grad.item() == pytest.approx((UPSTREAM * terms).sum() * g, rel=1e-5)


def test_lsq_per_channel_sums_each_channel_alone():
    w = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = LSQ(3, (3, 2, 2, 2), signed=True, granularity=PerChannel(0))
    q.fit(TensorStats.of(w.detach(), PerChannel(0)))
    q(w).sum().backward()
    for c in range(3):
        v = w.detach()[c].flatten().double().numpy() / q.scale[c].item()
        inside = (v > -4) & (v < 3)
        terms = np.where(inside, np.rint(v) - v, np.clip(v, -4, 3))
        assert q.scale.grad[c].item() == pytest.approx(terms.sum() / math.sqrt(8 * 3), rel=1e-4)


def test_uniform_lets_the_limits_through():
    x = np.array([-2, -1.0001, -1, -0.4, 0, 0.1, 0.55, 1.9, 2, 2.0001, 3])
    q = Uniform(2, (11,), symmetric=False, range=Fixed(-1, 2))  # step 1, zero point 1: the limits are exact
    dx = backward(fitted(q, x), x)
    np.testing.assert_allclose(dx, UPSTREAM * ((x >= -1) & (x <= 2)), rtol=1e-6)


@pytest.mark.parametrize(("k", "unscale"), [(1.0, True), (0.5, True), (0.5, False)])
def test_dorefa_inputs(k, unscale):
    x = np.array([-3, -0.1, 0, 0.2, 0.5, 0.9, 1.0, 1.9, 2.0, 2.1, 7])
    q = DoReFaInput(2, (11,), signed=False, range=k, unscale=unscale)
    dx = backward(fitted(q, np.abs(x)), x)
    inside = (k * x >= 0) & (k * x <= 1)
    np.testing.assert_allclose(dx, UPSTREAM * inside * (1 if unscale else k), rtol=1e-6)


@pytest.mark.parametrize("rescale", ["none", "max"])
@pytest.mark.parametrize("variant", ["original", "symmetric"])
def test_dorefa_weights_through_tanh_and_the_maximum(variant, rescale):
    w = np.array([-1.5, -0.6, -0.2, 0, 0.05, 0.3, 0.9, 1.2, -0.01, 2.2, -2.1])
    dx = backward(DoReFaWeight(4, (11,), variant=variant, rescale=rescale), w)
    t, peak = np.tanh(w), np.tanh(2.2)
    norm = t / peak
    quantized = np.rint(norm * 7) / 7 if variant == "symmetric" else 2 * np.rint((norm / 2 + 0.5) * 15) / 15 - 1
    inner = UPSTREAM / peak
    inner[9] -= (UPSTREAM * t).sum() / peak**2
    if rescale == "max":  # the product rule: the restored magnitude moves with the largest weight
        inner = inner * peak
        inner[9] += (UPSTREAM * quantized).sum()
    np.testing.assert_allclose(dx, inner * (1 - t**2), rtol=1e-4, atol=1e-6)
    if rescale == "none":

        def loss(v: np.ndarray) -> float:  # rounding replaced by the identity: 2 (t/2 + 1/2) - 1 = t in either variant
            return float((UPSTREAM * np.tanh(v) / np.abs(np.tanh(v)).max()).sum())

        step = 1e-6
        numeric = [(loss(w + step * e) - loss(w - step * e)) / (2 * step) for e in np.eye(11)]
        np.testing.assert_allclose(dx, numeric, rtol=2e-4, atol=1e-6)


def test_scales_and_clips_stay_positive_after_a_step():
    pact = fitted(PACT(4, (4,), signed=False, range=1.0), np.ones(4))
    lsq = fitted(LSQ(4, (4,), signed=True), np.ones(4))
    with torch.no_grad():
        pact.alpha.fill_(-3.0)
        lsq.scale.fill_(-3.0)
    for q in (pact, lsq):
        q.on_optimizer_step(torch.ones(4))
        assert (q.scale > 0).all() and torch.isfinite(q(torch.ones(4))).all()
