"""LCQ: published vectors, closed-form gradients, the curve and its inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.lcq import LCQ
from qexp.statistics.stats import TensorStats

THETA = (0.5, 0.0, -0.5, 0.2)


def near(got: Tensor, *expected: float, tolerance: float = 2e-6) -> None:
    assert got.detach().flatten().tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)


def made(bits: int, alpha: float, theta=THETA, signed: bool = True, **options) -> LCQ:
    q = LCQ(bits, (7,), signed=signed, pieces=len(theta), **options)
    q.fit(TensorStats.of(torch.tensor([-1.0 * signed, 1.0])))
    with torch.no_grad():
        q.alpha.fill_(alpha)
        q.theta.copy_(torch.tensor(theta))
    return q


def test_the_curve_and_its_levels():
    q = made(4, 1.0)
    slopes, heights = q.curve()
    near(slopes, 1.473173, 0.8935244, 0.5419499, 1.091353)
    near(heights, 0, 0.3682932, 0.5916742, 0.7271617)
    near(q.table(), 0, 0.09697244, 0.1939449, 0.3174613, 0.4773418, 0.7262413, 0.8691009, 1)


def test_the_vector_and_its_gradients():
    q = made(4, 1.0)
    x = torch.tensor([-1.2, -0.35, -0.05, 0.12, 0.4, 0.66, 0.95]).requires_grad_()
    g = torch.tensor([1, -1, 2, 1, 0.5, -1, 1])
    assert q.codes(x).int().tolist() == [-7, -3, -1, 1, 4, 5, 7]
    y = q(x)
    (y * g).sum().backward()
    near(y, -1, -0.3174613, -0.09697244, 0.09697244, 0.4773418, 0.7262413, 1)
    near(x.grad, 0, -1, 2, 1, 0.5, -1, 1)
    near(q.alpha.grad, -1.127082)
    near(q.theta.grad, 0.07016915, -0.03451978, 0.04902336, -0.08467273)


def test_a_flat_theta_is_a_uniform_quantizer():
    q = made(2, 2.0, (0.0, 0.0, 0.0, 0.0), signed=False)
    near(q(torch.tensor([0.1, 0.3, 0.62, 1.5, 2.4])), 0, 0, 0.6666667, 1.333333, 2)


def test_standardised_weights():
    w = torch.tensor([0.5, -0.2, 0.3, -1.4, 0.1, 0.4])
    q = made(3, 1.8, normalize=True)
    near(q(w), 0.811706, -0.2877053, 0.2877053, -1.271519, 0.2877053, 0.2877053)
    near(q.deviation, 0.7063993)


def test_theta_gets_the_gradient_of_the_curve_and_of_its_inverse():
    """The same by autograd, the rounding passed straight through, where levels and values lie in different pieces too."""
    torch.manual_seed(0)
    q = made(3, 1.0, (1.0, -1.0, 0.7, -0.4, 0.1))
    x, g = torch.rand(500) * 1.1, torch.randn(500)
    (q(x) * g).sum().backward()
    theta = q.theta.detach().clone().requires_grad_()
    p = torch.softmax(theta, 0)
    slopes, heights = 5 * p, torch.cumsum(p, 0) - p
    k = (x * 5).long().clamp_max(4)
    y = slopes[k] * (x - k / 5) + heights[k]
    rounded = y + (torch.round(3 * y) / 3 - y).detach()
    j = (torch.searchsorted(heights.detach(), rounded.detach(), right=True) - 1).clamp(0, 4)
    z = (rounded - heights[j]) / slopes[j] + j / 5
    (torch.where(x < 1, z, 0) * g).sum().backward()
    assert bool((k != j).any()) and torch.allclose(q.theta.grad, theta.grad, atol=1e-4)


def test_a_piece_never_becomes_flat():
    q = made(4, 1.0, (50.0, 0.0, 0.0, 0.0))
    assert float(q.curve()[0].detach().min()) > 5e-4
    assert torch.isfinite(q(torch.linspace(-1, 1, 33))).all()


def test_a_table_of_few_bits_holds_integers():
    levels = made(4, 1.0, table_bits=8).table() * 127
    assert torch.equal(levels, levels.round()) and levels.diff().min() > 0


def test_an_unsigned_tensor_has_nothing_below_zero():
    q = made(3, 1.0, signed=False)
    x = torch.tensor([-0.4, 0.4, 0.8]).requires_grad_()
    y = q(x)
    y.sum().backward()
    assert y[0] == 0 and x.grad.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: LCQ(9, (4,)),
        lambda: LCQ(4, (4,), pieces=0),
        lambda: LCQ(4, (4,), table_bits=3),
        lambda: LCQ(4, (4,), rounding="floor"),
        lambda: LCQ(4, (4, 1), granularity=PerChannel(0)),
    ],
)
def test_what_is_not_allowed_is_refused(make):
    with pytest.raises(QexpError, match=r"LCQ: .*allowed"):
        make()
