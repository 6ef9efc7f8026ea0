"""Thresholds of least divergence from calibration's own bins: near those of the values, at every scale of the tensor."""

import numpy as np
import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import UniformGrid
from qexp.ranges import KL, Context
from qexp.ranges.kl import one_sided_index
from qexp.statistics.stats import TensorStats

AFFINE = Context(symmetric=False)


def binned(x: torch.Tensor) -> TensorStats:
    """Returns the statistics that calibration keeps of a tensor."""
    stats = TensorStats()
    stats.update(x.reshape(4, -1))
    return stats


@pytest.mark.parametrize("scale", [1, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9])
@pytest.mark.parametrize("bins, magnitudes", [(2048, True), (2001, False), (8001, False)])
def test_bins_that_are_no_multiples_get_even_shares(scale, bins, magnitudes):
    """A tensor that fills its range evenly fills the bins evenly; with bin centres alone, some got twice their neighbour's."""
    x = torch.linspace(-1, 1, 2_000_000) * scale
    counts = binned(x).density.counts(0, 0.0 if magnitudes else -scale, scale, bins, magnitudes)
    assert counts.sum() == pytest.approx(len(x), rel=1e-6)
    inner = counts[1:-1]
    assert inner.max() <= 1.02 * inner.min() + 2


@pytest.mark.parametrize("magnitudes", [True, False])
def test_counts_are_near_those_of_the_values(magnitudes):
    torch.manual_seed(0)
    x = (torch.distributions.Laplace(0.1, 1.0).sample((400_000,)) * 1.37).relu() - (0 if magnitudes else 0.5)
    limit = float(x.abs().max())
    ends = (0.0 if magnitudes else -limit, limit, 2001, magnitudes)
    kept, exact = (s.density.counts(0, *ends) for s in (binned(x), TensorStats.of(x)))
    assert kept.sum() == exact.sum() == (int((x != 0).sum()) if magnitudes else len(x)), (
        "zeros count, magnitudes of zero do not"
    )
    assert np.abs(kept.cumsum() - exact.cumsum()).max() <= exact.max(), "a value is in its bin or in the next"
    assert (kept == kept.round()).all()


def test_a_zero_counts_in_its_own_bin():
    x = torch.tensor([-1.0, 0, 0, 0, 0.9, 0.7, -0.3, 0]).repeat(4)
    assert (
        binned(x).density.counts(0, -1.0, 1.0, 5).tolist() == TensorStats.of(x).density.counts(0, -1.0, 1.0, 5).tolist()
    )
    assert binned(torch.zeros(8)).density.counts(0, -1.0, 1.0, 3).tolist() == [0, 8, 0]


def test_the_share_of_the_range_that_is_kept_does_not_hang_on_the_scale():
    x = np.maximum(np.random.RandomState(0).randn(400_000), 0).astype(np.float32)
    kept = []
    for scale in (1, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2):
        y = torch.from_numpy(x * np.float32(scale))
        kept.append(float(KL()(binned(y), UniformGrid(8, signed=False), AFFINE)[1]) / float(y.max()))
    exact = float(KL()(TensorStats.of(torch.from_numpy(x)), UniformGrid(8, signed=False), AFFINE)[1]) / float(x.max())
    assert np.median(kept) == pytest.approx(exact, abs=0.001)
    assert max(kept) - min(kept) < 0.035, "what is left is a near-tie of divergences"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tensor_without_negatives_takes_all_its_levels_or_half_of_them(bits):
    torch.manual_seed(0)
    x = torch.distributions.Exponential(1.0).sample((50_000,))
    given, limit = TensorStats.of(x), float(x.max())
    counts = np.histogram(x.double().numpy(), bins=2048, range=(0, limit))[0]
    for groups, quantized in (("levels", 2**bits), ("half", 2 ** (bits - 1))):
        _, high = KL(groups=groups)(given, UniformGrid(bits, signed=False), AFFINE)
        expected = min((one_sided_index(counts, quantized) + 0.5) * limit / 2048, limit)
        assert high.item() == pytest.approx(expected)


def test_unknown_options_are_refused():
    with pytest.raises(QexpError, match="is not allowed; use levels or half"):
        KL(groups="128")
    with pytest.raises(QexpError, match="is not allowed; use auto"):
        KL("two_sided")
