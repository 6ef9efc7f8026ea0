"""Extra collectors: requested by a quantizer, collected at every site, saved with the statistics, passed to `fit`."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate, collect
from qexp.network.facts import facts
from qexp.quantizers.uniform import Uniform
from qexp.recipe import Recipe, apply, resolve
from qexp.statistics.collectors import LeastMagnitude, MaxMap, merged


class Curious(Uniform):
    """A quantizer that keeps what was collected for it."""

    collectors = (MaxMap(), LeastMagnitude())

    def fit(self, stats, followed_by_relu=False):
        super().fit(stats, followed_by_relu)
        self.seen = dict(stats.extra)


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=g) for _ in range(3)]


def curious(model: nn.Module, images: torch.Tensor) -> nn.Module:
    spec = {"_target_": Curious, "granularity": "tensor"}
    structure = facts(model, images)
    sites = {"input": spec, "weight": spec, "bias": None, "output": None}
    apply(model, resolve(model, structure, Recipe(sites)), structure)
    return model


def test_the_map_and_the_least_magnitude_are_those_of_all_images(residual, batches):
    seen = collect(residual, batches, progress=False, collectors=(MaxMap(), LeastMagnitude()))
    x = torch.cat(batches)
    assert torch.equal(seen["stem", "input"].extra["max_map"], x.abs().amax(0))
    assert seen["stem", "input"].extra["least_magnitude"].item() == x.abs().min()
    assert seen["conv", "output"].extra["max_map"].shape == (12, 3, 3)
    assert seen["add", "input.0"].extra.keys() == {"max_map", "least_magnitude"}


def test_zeros_do_not_count_as_least():
    c = LeastMagnitude()
    assert merged(c, None, c.first(torch.zeros(2, 2))).item() == float("inf")
    assert merged(c, c.first(torch.zeros(2, 2)), c.first(torch.tensor([[0.0, -0.5]]))).item() == 0.5


def test_what_is_collected_reaches_fit_and_comes_back_from_the_cache(residual, batches, tmp_path, caplog):
    model = curious(residual, batches[0])
    twin = deepcopy(model)
    calibrate(model, batches, cache_dir=tmp_path, progress=False)
    first = model.conv.input_quantizer.seen
    assert first["max_map"].shape == (8, 8, 8)
    assert model.conv.weight_quantizer.seen["least_magnitude"].item() == model.conv.weight.abs().min()
    with caplog.at_level("INFO"):
        calibrate(twin, batches, cache_dir=tmp_path, progress=False)
    assert "no forward pass needed" in caplog.text
    assert all(torch.equal(v, twin.conv.input_quantizer.seen[k]) for k, v in first.items())


def test_statistics_without_the_collectors_have_another_name(residual, batches, tmp_path):
    plain = deepcopy(residual)
    spec = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}
    structure = facts(plain, batches[0])
    apply(plain, resolve(plain, structure, Recipe({"input": spec})), structure)
    calibrate(plain, batches, cache_dir=tmp_path, progress=False)
    calibrate(curious(residual, batches[0]), batches, cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
