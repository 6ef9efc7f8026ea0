"""Rounding variables: the vectors, and their gradients against closed forms in float64."""

import numpy as np
import pytest
import torch

from qexp.numerics import PerChannel
from qexp.passes.reconstruction.rounding import Annealing, SoftRounding, rectified_sigmoid, regularizer, start
from qexp.quantizers.learned_rounding import LearnedRounding
from qexp.ranges import MSE
from qexp.statistics.stats import TensorStats


def test_the_vectors():
    """V10.1-a, -b, -c."""
    position = torch.tensor([0.37, -0.12, 0.8, 0.49], dtype=torch.float64) / 0.25
    fraction = position - position.floor()
    assert position.floor().tolist() == [1, -1, 3, 1]
    assert fraction.tolist() == pytest.approx([0.48, 0.52, 0.2, 0.96])
    v = start(fraction)
    assert v.tolist() == pytest.approx([-0.0666914, 0.0666914, -1.0986123, 2.0243818], abs=1e-7)
    assert regularizer(rectified_sigmoid(v), 20).item() == pytest.approx(3.8112701, abs=1e-7)
    assert regularizer(rectified_sigmoid(v), 2).item() == pytest.approx(2.7904, abs=1e-7)
    h = rectified_sigmoid(torch.tensor([0.0, 2.0, 2.4, -3.0], dtype=torch.float64))
    assert h.tolist() == pytest.approx([0.5, 0.9569565, 1, 0], abs=1e-7)
    anneal = Annealing(20_000)
    assert [anneal.beta(step) for step in (0, 4000, 12_000, 20_000)] == [20, 20, 11, 2]
    assert [anneal.active(step) for step in (0, 3999, 4000)] == [False, False, True]


def quantizer(bits: int, w: torch.Tensor) -> LearnedRounding:
    q = LearnedRounding(bits, tuple(w.shape), signed=True, granularity=PerChannel(0), range=MSE())
    q.fit(TensorStats.of(w, PerChannel(0)))
    return q


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_starts_at_the_float_weight_inside_the_grid_and_at_its_end_outside(bits):
    torch.manual_seed(0)
    w = torch.randn(4, 3, 3, 3)
    q = quantizer(bits, w)
    qmin, qmax = q.limits
    expected = torch.minimum(torch.maximum(w, qmin * q.scale), qmax * q.scale)
    assert torch.allclose(SoftRounding(q, w)(), expected, atol=2e-6)
    assert bits == 8 or not torch.equal(expected, w), "some weight lies outside"


@pytest.mark.parametrize("beta", [20.0, 7.5, 2.0])
def test_gradients_are_the_closed_forms(beta):
    """Of `sum(g * soft) + strength * regularizer` to v, by the chain rule in numpy float64."""
    torch.manual_seed(1)
    w, g, strength = torch.randn(3, 5) * 0.4, torch.randn(3, 5), 0.3
    q = quantizer(3, w)
    soft = SoftRounding(q, w)
    with torch.no_grad():
        soft.v += torch.randn_like(soft.v) * 2  # so that some are at 0 and 1
    ((soft() * g).sum() + strength * regularizer(soft.h(), beta)).backward()

    v, scale = soft.v.detach().double().numpy(), q.scale.double().numpy()
    floor = np.floor(w.numpy() / q.scale.numpy())
    s = 1 / (1 + np.exp(-v))
    raw = 1.2 * s - 0.1
    h = raw.clip(0, 1)
    dh = 1.2 * s * (1 - s) * ((raw > 0) & (raw < 1))
    qmin, qmax = q.limits
    inside = (floor + h >= qmin) & (floor + h <= qmax)
    u = 2 * h - 1
    dreg = -beta * np.abs(u) ** (beta - 1) * np.sign(u) * 2
    expected = (g.double().numpy() * scale * inside + strength * dreg) * dh
    assert (dh == 0).any() and (dh > 0).any()
    np.testing.assert_allclose(soft.v.grad.numpy(), expected, rtol=2e-4, atol=1e-6)


def test_hard_codes_are_up_where_v_is_not_negative():
    torch.manual_seed(2)
    w = torch.randn(3, 7)
    q = quantizer(4, w)
    soft = SoftRounding(q, w)
    with torch.no_grad():
        soft.v.copy_(torch.randn_like(soft.v))
    soft.harden(w)
    codes = (torch.floor(w / q.scale) + (soft.v >= 0)).clamp(*q.limits)
    assert torch.equal(q.codes(w).float(), codes) and torch.equal(q(w), codes * q.scale)
