"""k-means codebooks: the vector, few distinct values, seeds, corrections, and the float clip."""

import numpy as np
import pytest
import torch

from qexp.errors import QexpError
from qexp.layers.swap import swap
from qexp.network.facts import facts
from qexp.numerics import PerChannel
from qexp.passes.base import PassContext
from qexp.passes.kmeans_clip import KMeansClip
from qexp.passes.weight_correction import WeightCorrection
from qexp.quantizers.kmeans import KMeans, centres
from qexp.statistics.stats import TensorStats

W = torch.tensor([-1.02, -0.98, -0.3, -0.28, 0.01, 0, 0.5, 0.52])


def fitted(w: torch.Tensor, bits: int, **options) -> KMeans:
    q = KMeans(bits, tuple(w.shape), **options)
    q.fit(TensorStats.of(w))
    return q


def test_the_vector():
    """V2.7-a."""
    q = fitted(W, 2)
    assert q.centres.tolist() == pytest.approx([-1, -0.29, 0.005, 0.51], abs=1e-6)
    assert q.codes(W).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and q.levels == 4
    assert q(W).tolist() == pytest.approx([-1, -1, -0.29, -0.29, 0.005, 0.005, 0.51, 0.51], abs=1e-6)


@pytest.mark.parametrize("w", [torch.zeros(12), torch.full((12,), -0.7), torch.tensor([1.0, -2.0, 1.0, 0.5])])
def test_fewer_distinct_values_than_centres_pass_unchanged(w):
    q = fitted(w, 4)
    assert torch.equal(q(w), w) and q.levels == len(w.unique())
    assert torch.equal(q.dequantize(q.codes(w)), w)
    fresh = KMeans(4, tuple(w.shape))
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(w), w) and fresh.levels == q.levels


def test_centres_are_the_means_of_their_clusters_and_beat_an_even_grid():
    torch.manual_seed(0)
    w = torch.distributions.Laplace(0.0, 1.0).sample((20000,))
    q = fitted(w, 3)
    codes = q.codes(w)
    means = torch.stack([w[codes == i].mean() for i in range(8)])
    torch.testing.assert_close(means, q.centres, atol=5e-3, rtol=0)
    even = torch.linspace(w.min().item(), w.max().item(), 8)
    nearest = even[(w[:, None] - even).abs().argmin(1)]
    assert (q(w) - w).square().mean() < 0.2 * (nearest - w).square().mean()


def test_the_seed_decides():
    torch.manual_seed(0)
    w = torch.randn(500)
    assert torch.equal(fitted(w, 4, seed=3).centres, fitted(w, 4, seed=3).centres)
    assert not torch.equal(fitted(w, 4, seed=3, n_init=1).centres, fitted(w, 4, seed=4, n_init=1).centres)


def test_weights_count_as_often_as_they_occur():
    values, counts = np.array([0.0, 1.0, 10.0]), np.array([3.0, 1.0, 1.0])
    assert centres(values, counts, 2, 0, 10).tolist() == pytest.approx([0.25, 10])


def test_tiny_weights_cluster_like_large_ones():
    assert fitted(W * 1e-30, 2).centres.tolist() == pytest.approx([-1e-30, -0.29e-30, 0.005e-30, 0.51e-30], rel=1e-4)


def test_gradient_is_one_between_the_outermost_centres():
    q = fitted(W, 2)
    x = torch.tensor([-1.5, -0.9, 0.2, 0.9], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_other_granularities_and_sites_are_refused():
    with pytest.raises(QexpError, match="granularity=channel is not allowed; use tensor"):
        KMeans(4, (8, 3), granularity=PerChannel(0))
    with pytest.raises(QexpError, match="n_init"):
        KMeans(4, n_init=0)
    with pytest.raises(QexpError, match="cannot sit on 'input'"):
        swap(torch.nn.Conv2d(1, 1, 1), {"input": KMeans(4)})


def test_means_of_channels_can_be_restored():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3)
    net = torch.nn.Sequential(layer)
    structure = facts(net, torch.zeros(1, 3, 8, 8))
    q = KMeans(2, (8, 3, 3, 3))
    swap(layer, {"weight": q})
    q.fit(TensorStats.of(layer.weight))
    WeightCorrection("mean").on_fitted(net, PassContext(structure, [], {}))
    torch.testing.assert_close(layer.quantized_weight().mean((1, 2, 3)), layer.weight.mean((1, 2, 3)))
    assert torch.equal(q.dequantize(q.codes(layer.weight)), q(layer.weight))


def test_the_float_clip_cuts_at_the_outermost_centres_and_skips_the_ends():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 4)
    )
    context = PassContext(facts(net, torch.zeros(1, 3, 8, 8)), [], {})
    before = [net[i].weight.detach().clone() for i in (0, 1, 3)]
    KMeansClip(bits=2).on_float(net, context)
    q = fitted(before[1], 2)
    assert torch.equal(net[1].weight, before[1].clamp(q.centres[0], q.centres[-1]))
    assert torch.equal(net[0].weight, before[0]) and torch.equal(net[3].weight, before[2])
    assert 0 < context.findings["kmeans_clipped"] < 50
    with pytest.raises(QexpError, match="matches no weighted layer"):
        KMeansClip(skip=["conv*"]).on_float(net, context)
    with pytest.raises(QexpError, match="every weighted layer is skipped"):
        KMeansClip(skip=["*"]).on_float(net, context)
