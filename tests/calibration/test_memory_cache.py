"""What the points of a sweep share in memory is what each would have found alone, and nothing else is shared."""

from __future__ import annotations

import copy

import pytest
import torch

from qexp.calibration import memory_cache
from qexp.calibration.calibrate import calibrate, fit
from qexp.layers import quantizers, swap
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.uniform import Uniform
from qexp.ranges import MSE, Percentile
from qexp.statistics.stats import TensorStats
from tests.networks import Residual

BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture(autouse=True)
def nothing_held():
    memory_cache.forget()
    yield
    memory_cache.forget()


@pytest.fixture
def searches(monkeypatch) -> list[int]:
    """Counts the range searches that were really made."""
    made: list[int] = []
    search = MSE.__call__
    monkeypatch.setattr(MSE, "__call__", lambda *args: made.append(1) or search(*args))
    return made


def network(method: type = Uniform, bits: int = 4, abits: int = 4, seed: int = 0, **options) -> Residual:
    torch.manual_seed(seed)
    model = Residual().eval()
    for name in ("stem", "depthwise", "conv"):
        layer = model.get_submodule(name)
        weight = method(bits, tuple(layer.weight.shape), **options)
        swap(layer, {"input": method(abits, (1, layer.in_channels, 8, 8), **options), "weight": weight})
    return model


def test_points_of_a_sweep_search_each_range_once(tmp_path, searches):
    calibrate(network(range=MSE()), BATCHES, cache_dir=tmp_path, progress=False)
    searches.clear()
    for bits in (2, 4, 8):
        for abits in (2, 4, 8):
            calibrate(network(bits=bits, abits=abits, range=MSE()), BATCHES, cache_dir=tmp_path, progress=False)
    assert len(searches) == 3 * 2 + 3 * 3, "three sites at three widths; those of the weights at 4 bits were known"


@pytest.mark.parametrize("rule", [MSE(candidates=20), Percentile(0.99)], ids=repr)
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"pow2_scale": True}, {"narrow": True}], ids=str)
def test_what_is_shared_is_what_one_finds_alone(tmp_path, rule, options):
    calibrate(network(range=MSE()), BATCHES, cache_dir=tmp_path, progress=False)
    for bits in (3, 6):
        shared, alone = (network(bits=bits, range=rule, **options) for _ in range(2))
        calibrate(shared, BATCHES, cache_dir=tmp_path, progress=False)
        memory_cache.forget()
        calibrate(alone, BATCHES, progress=False)
        for (_, _, a), (_, _, b) in zip(quantizers(shared), quantizers(alone)):
            assert torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


def test_a_learned_scale_does_not_change_what_the_next_point_starts_from(tmp_path, searches):
    first = network(LSQ, range=MSE())
    calibrate(first, BATCHES, cache_dir=tmp_path, progress=False)
    calibrate(first, BATCHES, cache_dir=tmp_path, progress=False)
    start = [q.scale.detach().clone() for _, _, q in quantizers(first)]
    with torch.no_grad():
        for _, _, q in quantizers(first):
            q.scale.mul_(2)
    second = network(LSQ, range=MSE())
    searches.clear()
    calibrate(second, BATCHES, cache_dir=tmp_path, progress=False)
    assert not searches
    assert all(torch.equal(q.scale, s) for (_, _, q), s in zip(quantizers(second), start))


def test_other_weights_are_other_statistics():
    a = network()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.conv.weight[0, 0, 0, 0] += 1
    assert memory_cache.weight_stats(a.conv.weight) is memory_cache.weight_stats(a.conv.weight.clone())
    assert memory_cache.weight_stats(a.conv.weight) is not memory_cache.weight_stats(b.conv.weight)
    assert memory_cache.weight_stats(a.conv.weight) is not memory_cache.weight_stats(a.conv.weight, PerChannel(0))
    assert float(memory_cache.weight_stats(b.conv.weight).max) == float(TensorStats.of(b.conv.weight).max)


def test_what_is_found_is_forgotten_when_more_is_seen():
    stats = TensorStats.of(torch.tensor([0.0, 1.0]))
    greatest = lambda: float(stats.max)  # noqa: E731 - a function to hand over
    assert stats.remember("max", greatest) == 1
    stats.merge(TensorStats.of(torch.tensor([5.0])))
    assert stats.remember("max", greatest) == 5


def test_only_so_much_is_held():
    held = memory_cache.Kept(10)
    made = []
    for key in "abcab":
        held.get(key, 4, lambda key=key: made.append(key) or key)
    assert made == list("abcab") and held.held == 8, "a was dropped for c, then b for a, then c for b"
    held.get("large", 11, lambda: "large")
    assert held.held == 8


def test_kept_statistics_are_read_once_while_their_file_is_the_same(tmp_path, monkeypatch):
    calibrate(network(), BATCHES, cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.glob("*.safetensors")
    seen = memory_cache.kept_stats(path)
    assert memory_cache.kept_stats(path) is seen
    path.write_bytes(path.read_bytes())
    assert memory_cache.kept_stats(path) is not seen and memory_cache.kept_stats(tmp_path / "none") is None


def test_ranges_searched_for_one_network_are_not_those_of_another(tmp_path):
    """Same shapes, same recipe, other weights: nothing found for the first reaches the second."""
    scales = []
    for seed in (0, 1):
        model = network(range=MSE(), seed=seed)
        calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
        scales.append([q.scale.clone() for _, _, q in quantizers(model)])
        fit(model, calibrate(model, BATCHES, progress=False))
        assert all(torch.equal(q.scale, s) for (_, _, q), s in zip(quantizers(model), scales[-1]))
    assert sum(torch.equal(a, b) for a, b in zip(*scales)) == 1, "the images alone are the same"
