"""The range searched on a histogram costs at most 1 % more error than the best of all ranges tried on the values themselves."""

import numpy as np
import pytest
import torch

from qexp.calibration.calibrate import CHANNEL_BINS
from qexp.numerics import PerChannel, PerTensor
from qexp.quantizers.uniform import Uniform
from qexp.ranges import MSE
from qexp.ranges.mse import grid_errors
from qexp.statistics.stats import TensorStats

CANDIDATES = 100


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_t(3, n)


def laplace(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.laplace(size=n)


def one_sided(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.maximum(rng.standard_normal(n), 0)


def spiky(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.standard_normal(n) * 0.05
    x[rng.integers(n, size=max(n // 2000, 2))] = 3.0
    return x


def uniform_positive(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(0.2, 1.0, n)


SHAPES = (heavy, laplace, one_sided, spiky, uniform_positive)


def error(q: Uniform, rows: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    qmin, qmax = q.limits
    codes = np.clip(np.rint(rows / scale[:, None] + zero[:, None]), qmin, qmax)
    return ((rows - (codes - zero[:, None]) * scale[:, None]) ** 2).mean(1)


def brute_force(q: Uniform, rows: np.ndarray) -> np.ndarray:
    """Returns the least error of each row over all shrinkings of its range."""
    low, high = torch.from_numpy(rows.min(1)), torch.from_numpy(rows.max(1))
    if q.symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    best = np.full(len(rows), np.inf)
    for i in range(CANDIDATES, 0, -1):
        scale, zero = q.parameters_of(low * i / CANDIDATES, high * i / CANDIDATES)
        best = np.minimum(best, error(q, rows, scale.double().numpy(), zero.double().numpy()))
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("granularity", "bins"), [(PerTensor(), 8192), (PerChannel(1), CHANNEL_BINS)])
def test_histogram_against_brute_force(granularity, bins, shape, bits, symmetric):
    rng = np.random.default_rng(7)
    x = torch.from_numpy(np.stack([shape(rng, 4 * 2500) for _ in range(3)]).astype(np.float32))
    x = (x * torch.tensor([1.0, 4.0, 0.02])[:, None]).reshape(3, 4, 50, 50).movedim(1, 0)
    stats = TensorStats(granularity, bins)
    for part in x.split(1):
        stats.update(part)
    q = Uniform(bits, (1, *x.shape[1:]), symmetric=symmetric, granularity=granularity, range=MSE(CANDIDATES))
    q.fit(stats)
    rows = granularity.rows(x).double().numpy()
    found = error(q, rows, q.scale.flatten().double().numpy(), q.zero_point.flatten().double().numpy())
    assert (found <= 1.01 * brute_force(q, rows)).all()


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_search_over_values_is_exact(bits, p):
    x = torch.from_numpy(heavy(np.random.default_rng(1), 2000).astype(np.float32)).reshape(4, 500)
    q = Uniform(bits, x.shape, signed=True, narrow=True, granularity=PerChannel(0), range=MSE(CANDIDATES, p))
    q.fit(TensorStats.of(x, PerChannel(0)))
    rows, limit = x.double().numpy(), x.abs().amax(1).double()

    def loss(scale: torch.Tensor) -> np.ndarray:
        s = scale.double().numpy()[:, None]
        return (np.abs(rows - np.clip(np.rint(rows / s), *q.limits) * s) ** p).mean(1)

    tried = np.stack([loss(q.parameters_of(-limit * i / 100, limit * i / 100)[0]) for i in range(100, 0, -1)])
    np.testing.assert_allclose(loss(q.scale.flatten()), tried.min(0), rtol=1e-9)


def test_ties_go_to_the_wider_range():
    x = torch.tensor([[-1.0, 0.0, 1.0]])
    q = Uniform(8, x.shape, signed=True, narrow=True, range=MSE())
    q.fit(TensorStats.of(torch.zeros(1, 3)))
    assert q.scale.item() == 1
    q.fit(TensorStats.of(x))
    assert q.scale.item() == pytest.approx(1 / 127)


def test_the_least_share_is_kept():
    x = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.01, torch.tensor([10.0])])
    free, bound = (Uniform(2, (5001,), signed=True, range=MSE(least=least)) for least in (0.0, 0.5))
    for q in (free, bound):
        q.fit(TensorStats.of(x))
    assert free.scale.item() < 0.5 * bound.scale.item() or bound.scale.item() >= 5.0
    assert bound.scale.item() == pytest.approx(10 * 0.5, rel=1e-3) or bound.scale.item() > 5


@pytest.mark.parametrize("exact", [True, False])
def test_candidates_are_tried_together_to_the_same_range(monkeypatch, exact):
    """However many levels are summed at once, and as one candidate after the other gives it."""
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(np.stack([heavy(rng, 3000), laplace(rng, 3000), one_sided(rng, 3000)])).float()
    stats = TensorStats(PerChannel(0), CHANNEL_BINS)
    stats.update(rows)
    density = TensorStats.of(rows, PerChannel(0)).density if exact else stats.density
    q = Uniform(4, rows.shape, symmetric=False, granularity=PerChannel(0))
    share = torch.linspace(1, 0.01, 100, dtype=torch.float64)[:, None]
    scale, zero = zip(*(q.parameters_of(stats.min * s, stats.max * s) for s in share))
    scale, zero = torch.stack(scale).double(), torch.stack(zero).double()
    together = grid_errors(density, scale, zero, q.grid)
    one = torch.stack([grid_errors(density, s[None], z[None], q.grid)[0] for s, z in zip(scale, zero)])
    levels = (torch.arange(16) - zero[7][:, None]) * scale[7][:, None]
    assert together.shape == (100, 3) and torch.equal(together, one)
    assert torch.allclose(together[7], density.squared_error(levels))
    monkeypatch.setattr("qexp.ranges.mse._AT_ONCE", 100)
    assert torch.equal(grid_errors(density, scale, zero, q.grid), together)
