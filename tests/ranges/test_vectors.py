"""Published vectors of the range rules."""

import numpy as np
import pytest
import torch

from qexp.numerics import UniformGrid
from qexp.ranges import ACIQ, KL, MSE, Context, Percentile
from qexp.ranges.aciq import analytic_alpha, analytic_error, exact_alpha, exact_error
from qexp.ranges.kl import mxnet_threshold
from qexp.statistics.stats import TensorStats

V1_7 = {  # bits: gauss a, gauss error, laplace a, laplace a over std, laplace error
    0: (0.76577507, 4.43810e-1, 1.04990889, 0.742398, 1.06738),
    1: (1.23990527, 2.15010e-1, 1.86281686, 1.317210, 5.99643e-1),
    2: (1.71063517, 8.71485e-2, 2.83068299, 2.001595, 2.84878e-1),
    3: (2.15159274, 3.14294e-2, 3.89722946, 2.755757, 1.19702e-1),
    4: (2.55913646, 1.04933e-2, 5.02864014, 3.555786, 4.60215e-2),
    6: (3.28691422, 1.01292e-3, 7.41312621, 5.241872, 5.67877e-3),
    8: (3.92403549, 8.70779e-5, 9.89675977, 6.998066, 5.98853e-4),
    9: (4.21632983, 2.48311e-5, 11.16268502, 7.893210, 1.86832e-4),
}
V1_8 = {  # bits: gauss full, gauss half, laplace full, laplace half
    2: (1.5726, 1.9523, 2.5756, 3.4864),
    3: (2.1064, 2.4739, 3.7740, 4.8199),
    5: (2.9263, 3.2701, 6.1657, 7.3586),
    6: (3.2817, 3.6075, 7.3912, 8.6178),
    8: (3.9226, 4.2147, 9.8903, 11.1555),
}


@pytest.mark.parametrize(("overflow", "alpha"), [(0, 10.0), (0.001, 9.99), (0.0015, 9.99), (0.1, 9.0)])
def test_percentile_is_an_order_statistic(overflow, alpha):
    """V1.4-a."""
    stats = TensorStats.of(torch.arange(1, 1001) / 100)
    _, high = Percentile(1 - overflow)(stats, UniformGrid(8, False), Context(symmetric=True))
    assert high.item() == pytest.approx(alpha, abs=1e-6)


def test_two_sided_percentile_cuts_both_ends():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    low, high = Percentile(0.99)(TensorStats.of(x), UniformGrid(8, False), Context(symmetric=False))
    ordered = x.double().sort().values
    assert (low.item(), high.item()) == (ordered[50].item(), ordered[-51].item())


@pytest.mark.parametrize(("bits", "p", "alpha", "loss"), [(4, 2, 5.82, 0.06128327), (3, 2.4, 5.22, 0.2253506)])
def test_mse_search(bits, p, alpha, loss):
    """V1.5-a, in float64 as the vectors are."""
    x = torch.tensor([-3, -1.2, -0.7, -0.3, 0, 0.2, 0.4, 0.9, 1.5, 6])
    grid = UniformGrid(bits, True, narrow=True)

    def parameters(low, high):
        return high / grid.qmax, torch.zeros_like(high)

    low, high = MSE(p=p)(TensorStats.of(x), grid, Context(True, False, parameters))
    assert high.item() == pytest.approx(alpha, abs=1e-6) and low.item() == -high.item()
    step = high.item() / grid.qmax
    y = np.clip(np.rint(x.double().numpy() / step), grid.qmin, grid.qmax) * step
    assert np.mean(np.abs(x.double().numpy() - y) ** p) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("draw", "bits", "limit", "threshold"), [("laplace", 4, 11.9252, 7.30056), ("standard_normal", 8, 4.85212, 4.66048)]
)
def test_kl_threshold(draw, bits, limit, threshold):
    """V1.6-a and -b: 100 000 samples of numpy's RandomState(0)."""
    x = getattr(np.random.RandomState(0), draw)(size=100_000)
    bins = 8001 if bits == 8 else 2001
    top = np.abs(x).max()
    assert top == pytest.approx(limit, abs=1e-4)
    counts = np.histogram(x, bins=bins, range=(-top, top))[0]
    assert mxnet_threshold(counts, top, 2**bits - 1) == pytest.approx(threshold, abs=1e-5)
    if bits == 4:  # from float32 statistics, as calibration has them
        _, high = KL("mxnet")(TensorStats.of(torch.from_numpy(x).float()), UniformGrid(4, True), Context())
        assert high.item() == pytest.approx(threshold, abs=0.012)


@pytest.mark.parametrize("bits", V1_7)
def test_analytic_clips(bits):
    """V1.7-a."""
    gauss, gauss_error, laplace, laplace_std, laplace_error = V1_7[bits]
    assert analytic_alpha("gauss", bits) == pytest.approx(gauss, abs=1e-7)
    assert analytic_alpha("laplace", bits) == pytest.approx(laplace, abs=1e-7)
    assert analytic_alpha("laplace", bits) / np.sqrt(2) == pytest.approx(laplace_std, abs=1e-6)
    assert analytic_error("gauss", gauss, bits) == pytest.approx(gauss_error, rel=1e-5)
    assert analytic_error("laplace", laplace, bits) == pytest.approx(laplace_error, rel=1e-5)


@pytest.mark.parametrize("bits", V1_8)
def test_exact_clips(bits):
    """V1.8-a: the minimum is flat, so the error at the published clip must not be lower either."""
    for (prior, half), published in zip(
        [("gauss", False), ("gauss", True), ("laplace", False), ("laplace", True)], V1_8[bits]
    ):
        found = exact_alpha(prior, bits, half)
        assert found == pytest.approx(published, abs=1e-3)
        assert exact_error(prior, found, bits, half) <= exact_error(prior, published, bits, half) + 1e-12


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("prior", ["gauss", "laplace"])
def test_exact_error_is_that_of_the_quantizer(prior, half):
    """The closed form against two million samples through the affine quantizer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2_000_000) if prior == "gauss" else rng.laplace(size=2_000_000)
    x = np.where(x >= 0, x, 0) if half else x
    n, alpha = 7, 2.2
    step = alpha / n if half else 2 * alpha / n
    zero = 0 if half else np.rint(alpha / step)
    y = (np.clip(np.rint(x / step + zero), 0, n) - zero) * step
    assert exact_error(prior, alpha, 3, half) == pytest.approx(np.mean((x - y) ** 2), rel=0.01)


def _stats(b: float, mean: float, least: float) -> TensorStats:
    """A summary with a given mean absolute deviation, mean and minimum: what the range formula reads."""
    stats = TensorStats.of(torch.tensor([0.0, 1.0]))
    one = torch.ones(1, dtype=torch.float64)
    stats.count, stats.total, stats.deviation = one, mean * one, b * one
    stats.batch_min, stats.batch_max = least * one[None], 9 * one[None]
    return stats


def test_from_clip_to_range():
    """V1.9-a and -b."""
    rule = ACIQ("laplace")
    low, high = rule(_stats(0.5, 0.2, -1.1), UniformGrid(4, False), Context(symmetric=False))
    assert low.item() == -1.1 and (high - low).item() == pytest.approx(5.02864014, abs=1e-8)
    low, high = rule(_stats(0.5, 0.2, -1.1), UniformGrid(3, False), Context(False, followed_by_relu=True))
    assert low.item() == 0 and high.item() == pytest.approx(2.71432007, abs=1e-8)


def test_the_half_range_takes_one_bit_more_and_channels_their_own():
    bits = torch.tensor([0, 2, 4])
    for prior in ("gauss", "laplace"):
        rule = ACIQ(prior)
        assert rule.constant(3, half=True) == analytic_alpha(prior, 4)
        stats = TensorStats.of(torch.randn(3, 500, generator=torch.Generator().manual_seed(0)), _per_channel())
        _, high = rule(stats, UniformGrid(bits, True), Context(symmetric=True))
        scale = stats.b if prior == "laplace" else stats.std
        expected = [
            analytic_alpha(prior, int(b)) * float(s) + abs(float(m)) for b, s, m in zip(bits, scale, stats.mean)
        ]
        assert high.tolist() == pytest.approx(expected)


def _per_channel():
    from qexp.numerics import PerChannel

    return PerChannel(0)
