"""Transposed convolutions in groups: output channel j of one group shares no scale with that of another."""

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.weight_correction import WeightCorrection
from qexp.recipe import Recipe, apply, resolve

WEIGHT = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "channel"}
LSQ = {"_target_": "qexp.quantizers.lsq.LSQ", "granularity": "channel"}


def quantized(groups: int, outputs: int, weight: dict, bits: int = 4) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    model = nn.Sequential(nn.ConvTranspose2d(8, outputs, 4, stride=2, padding=1, groups=groups)).eval()
    with torch.no_grad():
        model[0].weight[: 8 // groups] *= 100  # the first group
    structure = facts(model, x)
    apply(model, resolve(model, structure, Recipe(sites={"weight": weight}, wbit=bits, abit=32)), structure)
    return model, model[0], x


@pytest.mark.parametrize("weight", [WEIGHT, LSQ], ids=["uniform", "lsq"])
@pytest.mark.parametrize(("groups", "outputs", "scales"), [(4, 16, 4), (8, 8, 8), (8, 16, 16), (1, 16, 16)])
def test_each_group_has_scales_of_its_own(groups, outputs, scales, weight):
    model, layer, x = quantized(groups, outputs, weight)
    calibrate(model, [x], progress=False)
    q = layer.weight_quantizer
    assert q.scale.numel() == scales
    error = (q(layer.weight) - layer.weight).reshape(8, -1).norm(dim=1) / layer.weight.reshape(8, -1).norm(dim=1)
    assert groups == 1 or error.max() < 0.25  # with a scale for all groups the small ones would be zero: 1.0
    assert torch.equal(q.dequantize(q.codes(layer.weight)), q(layer.weight))


@pytest.mark.parametrize(("groups", "outputs"), [(4, 16), (8, 8), (8, 16), (1, 16)])
def test_means_are_restored_for_each_output_channel(groups, outputs):
    model, layer, x = quantized(groups, outputs, WEIGHT, bits=3)
    calibrate(model, [x], progress=False)
    WeightCorrection().on_fitted(model, PassContext(facts(model, x), [x], {}))
    shape = (groups, 8 // groups, outputs // groups, 16)
    got, wanted = (t.detach().reshape(shape).mean((1, 3)) for t in (layer.weight_quantizer(layer.weight), layer.weight))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
