"""What was seen of a tensor equals what a second look at all of it would give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.calibration.site_stats import SiteStats
from qexp.numerics import PerChannel, PerGroup, PerTensor
from qexp.statistics.stats import NonFinite, TensorStats
from tests.strategies import KINDS, values

SUMS = ("count", "zeros", "total", "squares", "absolute", "positive", "positive_total")


def batches(kind: str = "laplace", n: int = 4) -> list[torch.Tensor]:
    return [values(kind, (3, 5, 4, 4), seed) * (1 + seed) for seed in range(n)]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
@pytest.mark.parametrize("kind", ["normal", "relu", "spike", "offset", "zeros", "denormal"])
def test_moments_equal_brute_force(granularity, kind):
    stats = TensorStats(granularity)
    for x in batches(kind):
        stats.update(x)
    rows = granularity.rows(torch.cat(batches(kind))).double()
    assert torch.equal(stats.min, rows.amin(1)) and torch.equal(stats.max, rows.amax(1))
    assert torch.equal(stats.count, torch.full((len(rows),), float(rows.shape[1]), dtype=torch.float64))
    assert torch.equal(stats.zeros, (rows == 0).sum(1).double())
    torch.testing.assert_close(stats.mean, rows.mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats.mean_abs, rows.abs().mean(1), rtol=1e-5, atol=1e-12)
    assert stats.features == 5 * 4 * 4
    if kind != "offset":
        torch.testing.assert_close(stats.std, rows.std(1), rtol=1e-4, atol=1e-12)
    if kind == "normal":
        centred = rows - rows.mean(1, keepdim=True)
        kurtosis = centred.pow(4).mean(1) / centred.square().mean(1).square() - 3
        torch.testing.assert_close(stats.kurtosis, kurtosis, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
def test_the_scale_of_laplace_is_taken_from_each_batch(granularity):
    stats = TensorStats(granularity)
    deviation = 0
    for x in batches():
        stats.update(x)
        rows = granularity.rows(x).double()
        deviation = deviation + (rows - rows.mean(1, keepdim=True)).abs().sum(1)
    torch.testing.assert_close(stats.b, deviation / stats.count, rtol=1e-5, atol=0)


def test_extremes_of_batches_and_samples():
    stats = TensorStats(PerTensor())
    for x in batches():
        stats.update(x)
    assert stats.batch_max.flatten().tolist() == [x.max().item() for x in batches()]
    expected = [x.flatten(1).amin(1).double().mean().item() for x in batches()]
    assert stats.sample_min.flatten().tolist() == pytest.approx(expected)
    stats = TensorStats(PerChannel(1))
    stats.update(batches()[0])
    expected = batches()[0].flatten(2).amax(2).double().mean(0)
    torch.testing.assert_close(stats.sample_max[0], expected, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=5), data=st.data())
def test_merging_is_one_pass_in_any_order(kinds, data):
    parts = [values(kind, (2, 3, 4), i) for i, kind in enumerate(kinds)]
    for granularity in (PerTensor(), PerChannel(1)):
        whole = TensorStats(granularity, 64)
        for x in parts:
            whole.update(x)
        for order in (parts, data.draw(st.permutations(parts))):
            merged = TensorStats(granularity, 64)
            for x in order:
                one = TensorStats(granularity, 64)
                one.update(x)
                merged.merge(one)
            for name in SUMS:
                torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=0)
            assert torch.equal(merged.min, whole.min) and torch.equal(merged.max, whole.max)
            assert torch.equal(merged.histogram.counts.sum(1) + merged.zeros, whole.count)


def test_merging_leaves_the_other_summary_alone():
    a, b = TensorStats(), TensorStats()
    a.update(torch.tensor([0.0, 1.0, 2.0]))
    b.update(torch.tensor([-4.0, 5.0]))
    kept = {k: v.clone() for k, v in a.state().items()}
    merged = TensorStats()
    merged.merge(a)
    merged.merge(b)
    assert all(torch.equal(v, kept[k]) for k, v in a.state().items())
    assert merged.count.item() == 5 and merged.min.item() == -4


@pytest.mark.parametrize("exact", [(True, True), (True, False), (False, True), (False, False)])
def test_a_merged_summary_knows_the_values_of_both(exact):
    """Weights are summarised by their values, activations by histograms; one shared quantizer may sit on both."""
    parts = [values("normal", (40, 50), 0), values("laplace", (40, 50), 1) * 7]
    merged = TensorStats(bins=0)
    for x, whole in zip(parts, exact):
        one = TensorStats.of(x) if whole else TensorStats()
        if not whole:
            one.update(x)
        merged.merge(one)
    ordered = torch.cat([x.flatten() for x in parts]).double().sort().values
    for rank in (0, 400, 2000, 3999):
        found = merged.density.order(torch.tensor([float(rank)], dtype=torch.float64)).item()
        assert found == pytest.approx(ordered[rank].item(), abs=0.02)
    assert merged.density.count.item() == 4000


def test_state_round_trip_is_exact():
    stats = TensorStats(PerChannel(1), 32)
    for x in batches():
        stats.update(x)
    back = TensorStats.from_state(stats.state(), PerChannel(1))
    assert back.state().keys() == stats.state().keys()
    assert all(torch.equal(v, back.state()[k]) for k, v in stats.state().items())
    assert back.shape == stats.shape and back.bins == 32
    back.update(batches()[0])
    assert TensorStats.from_state({}, PerTensor()).empty


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    x = values("normal", (2, 3, 4, 4), 0)
    x[1, 2, 0, 0] = bad
    for granularity in (PerTensor(), PerChannel(1)):
        with pytest.raises(NonFinite, match="1 of 96 values are NaN or infinite"):
            TensorStats(granularity).update(x)


def test_large_finite_values_are_no_infinity():
    stats = TensorStats()
    stats.update(torch.tensor([3e38, 3e38, -3e38]))
    assert stats.max.item() == pytest.approx(3e38) and stats.histogram.counts.sum() == 3


def test_empty_batches_change_nothing():
    stats = TensorStats()
    stats.update(torch.empty(0, 3))
    assert stats.empty and stats.state() == {}


@pytest.mark.parametrize("shape", [(7,), (4, 6), (4, 6, 3), (4, 6, 3, 3), (4, 6, 2, 3, 3)])
def test_a_site_sees_tensor_and_channels_alike(shape):
    x = values("normal", shape, 0)
    site = SiteStats()
    site.update(x)
    assert site.tensor.min.item() == x.min().item() and site.tensor.count.item() == x.numel()
    torch.testing.assert_close(site.tensor.total[0], x.double().sum(), rtol=1e-5, atol=1e-6)
    if x.ndim > 1:
        assert site.channel.max.tolist() == x.movedim(1, 0).flatten(1).amax(1).tolist()


def test_groups_have_statistics_of_their_own():
    x = values("normal", (4, 6, 3, 3), 0)
    stats = TensorStats.of(x, PerGroup(9))
    assert stats.max.tolist() == x.reshape(-1, 9).amax(1).tolist()
