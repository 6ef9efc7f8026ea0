"""Published vectors of the uniform quantizer, DoReFa, PACT, mPACT and LSQ, forward and backward."""

import math

import pytest
import torch

from qexp.numerics import PerChannel
from qexp.quantizers.dorefa import DoReFaInput, DoReFaWeight
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.pact import PACT
from qexp.quantizers.uniform import Uniform
from qexp.ranges import Fixed
from qexp.statistics.stats import TensorStats

W = torch.tensor([-1.5, -0.6, -0.2, 0, 0.05, 0.3, 0.9, 1.2])
X = torch.tensor([-12, -3.2, -0.2, 0.4, 0.65, 1.7, 5.1, 9])


def near(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=0)


def affine(low: float, high: float, x: torch.Tensor, bits: int = 4, **options) -> Uniform:
    q = Uniform(bits, tuple(x.shape), symmetric=False, range=Fixed(low, high), **options)
    q.fit(TensorStats.of(x))
    return q


def test_affine():
    """V1.1-a."""
    x = torch.tensor([-1, -0.4, 0, 0.25, 0.55, 2])
    q = affine(-1, 2, x)
    assert q.scale.item() == pytest.approx(0.2) and q.zero_point.item() == 5
    assert q.codes(x).tolist() == [0, 3, 5, 6, 8, 15]
    near(q(x), [-1, -0.4, 0, 0.2, 0.6, 2])


@pytest.mark.parametrize(("rounding", "codes"), [("half_even", [4, 4, 6, 2]), ("half_away", [4, 5, 6, 3])])
def test_affine_ties_with_an_odd_zero_point(rounding, codes):
    """V1.1-b: the zero point is added before rounding."""
    x = torch.tensor([0.25, 0.75, 1.25, -0.25])
    q = affine(-1.5, 6, x, rounding=rounding)
    assert q.scale.item() == 0.5 and q.zero_point.item() == 3
    assert q.codes(x).tolist() == codes


def test_power_of_two_scale():
    """V1.1-d."""
    x = torch.tensor([-1, -0.4, 0, 0.25, 0.55, 2])
    q = affine(-1, 2, x, pow2_scale=True)
    assert q.scale.item() == 0.25 and q.zero_point.item() == 4
    assert q.codes(x).tolist() == [0, 2, 4, 5, 6, 12]


def test_a_range_without_zero_is_extended_to_hold_it():
    q = affine(2, 3, torch.tensor([2, 2.45, 3]))
    assert q.zero_point.item() == 0 and q.scale.item() == pytest.approx(0.2)
    assert q(torch.zeros(1)).item() == 0
    q = affine(-3, -2, torch.tensor([-2, -2.45, -3]))
    assert q.zero_point.item() == 15 and q(torch.zeros(1)).item() == 0


@pytest.mark.parametrize(
    ("bits", "variant", "expected"),
    [
        (4, "original", [-1, -0.6, -0.2, 0.066667, 0.066667, 0.333333, 0.733333, 0.866667]),  # V7.1-a
        (4, "symmetric", [-1, -0.571429, -0.285714, 0, 0, 0.285714, 0.857143, 0.857143]),  # V7.2-a
        (2, "symmetric", [-1, -1, 0, 0, 0, 0, 1, 1]),  # V7.2-b
    ],
)
def test_dorefa_weights(bits, variant, expected):
    q = DoReFaWeight(bits, (8,), variant=variant)
    near(q(W), expected)
    near(DoReFaWeight(bits, (8,), variant=variant, rescale="max")(W), [v * math.tanh(1.5) for v in expected])


@pytest.mark.parametrize("variant", ["original", "symmetric"])
def test_dorefa_weights_of_one_bit_are_signs_of_the_mean_magnitude(variant):
    w = W.clone().requires_grad_()
    y = DoReFaWeight(1, (8,), variant=variant)(w)
    mean = W.abs().mean().item()
    near(y, [mean if v >= 0 else -mean for v in W.tolist()])
    (y * torch.arange(8.0)).sum().backward()
    assert w.grad.tolist() == list(range(8))


def dorefa_input(**options) -> DoReFaInput:
    q = DoReFaInput(4, (8,), signed=False, **options)
    q.fit(TensorStats.of(X.clamp_min(0)))
    return q


def test_dorefa_inputs():
    """V7.3-a; and k = 0.1, divided out again or not."""
    near(dorefa_input(range=1.0, unscale=False)(X), [0, 0, 0, 0.4, 0.666667, 1, 1, 1])
    near(dorefa_input(range=1.0, unscale=True)(X), [0, 0, 0, 0.4, 0.666667, 1, 1, 1])
    x = X[:-1]  # the last, 9, is a tie at k = 0.1
    scaled = dorefa_input(range=0.1, unscale=False)(x)
    near(scaled, [0, 0, 0, 1 / 15, 1 / 15, 3 / 15, 8 / 15])
    near(dorefa_input(range=0.1, unscale=True)(x), (scaled * 10).tolist())


def pact(signed: bool, x: torch.Tensor) -> PACT:
    q = PACT(4, tuple(x.shape), signed=signed, range=6.0)
    q.fit(TensorStats.of(x))
    return q


def test_pact():
    """V7.5-a and -b."""
    near(pact(False, X)(X), [0, 0, 0, 0.4, 0.8, 1.6, 5.2, 6])
    x = torch.tensor([-12, -3, -0.2, 0, 0.4, 0.6, 1.7, 5, 5.99, 6, 9, 10, 11], requires_grad=True)
    q = pact(False, x.detach())
    q(x).sum().backward()
    assert q.alpha.grad.item() == 4
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]


def test_mpact():
    """V7.6-a."""
    near(pact(True, X)(X), [-6, -3.428571, 0, 0, 0.857143, 1.714286, 5.142857, 6])


V8_1 = [  # v, s, bits, signed, codes, ds terms, dx mask, initial s
    (
        [-1.2, -0.4, 0.1, 0.35, 0.9, 2],
        0.25,
        3,
        True,
        [-4, -2, 0, 1, 3, 3],
        [-4, -0.4, -0.4, -0.4, 3, 3],
        [0, 1, 1, 1, 0, 0],
        0.9526279,
    ),
    (
        [0, 0.24, 0.55, 0.9, 1.4, 3.2],
        0.4,
        2,
        False,
        [0, 1, 1, 2, 3, 3],
        [0, 0.4, -0.375, -0.25, 3, 3],
        [0, 1, 1, 1, 0, 0],
        1.2105111,  # 2 * 6.29 / 6 / sqrt(3)
    ),
]


@pytest.mark.parametrize(("v", "s", "bits", "signed", "codes", "ds", "dx", "first"), V8_1)
def test_lsq(v, s, bits, signed, codes, ds, dx, first):
    """V8.1-a and -b."""
    x = torch.tensor(v, requires_grad=True)
    q = LSQ(bits, (6,), signed=signed)
    q.fit(TensorStats.of(x.detach()))
    assert q.scale.item() == pytest.approx(first, abs=1e-6)
    with torch.no_grad():
        q.scale.fill_(s)
    assert q.codes(x).tolist() == codes
    y = q(x)
    near(y, [c * s for c in codes])
    y.sum().backward()
    g = 1 / math.sqrt(6 * (2 ** (bits - 1) - 1 if signed else 2**bits - 1))
    assert q.scale.grad.item() == pytest.approx(sum(ds) * g, abs=1e-6)
    assert x.grad.tolist() == dx
    for term, value in zip(ds, v):  # each element by itself
        one = torch.tensor([float(value)])
        q.scale.grad = None
        q(one).sum().backward()
        assert q.scale.grad.item() == pytest.approx(term * g, abs=1e-6)


def test_lsq_counts_the_elements_a_scale_serves():
    weight = torch.randn(4, 3, 3, 3)
    for granularity, n in ((None, 108), (PerChannel(0), 27)):
        q = LSQ(4, tuple(weight.shape), signed=True, granularity=granularity)
        q.fit(TensorStats.of(weight, q.granularity))
        assert q.grad_scale == pytest.approx(1 / math.sqrt(n * 7))
    for numel, n in (("features", 48), ("batch", 96)):
        x = torch.rand(2, 3, 4, 4)
        q = LSQ(4, (1, 3, 4, 4), signed=False, scale_numel=numel)
        stats = TensorStats()
        stats.update(x)
        q.fit(stats)
        with torch.no_grad():
            q.scale.fill_(0.01)  # everything above 0.15 saturates: each such element adds QP
        q(torch.ones_like(x)).sum().backward()
        assert q.scale.grad.item() == pytest.approx(96 * 15 / math.sqrt(n * 15), rel=1e-5)
