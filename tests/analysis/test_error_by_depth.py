"""Errors by depth and drift of batch norms, against the definition computed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from qexp.analysis.channel_spread import channel_measures
from qexp.analysis.error_by_depth import Sums, errors_by_depth, norm_drift
from qexp.analysis.tensor_errors import measure
from qexp.calibration.calibrate import calibrate
from qexp.layers.swap import quantizers_off, swap
from qexp.quantizers.uniform import Uniform
from qexp.ranges import MinMax


def quantized(model: nn.Module, images: torch.Tensor, bits: dict[str, int]) -> nn.Module:
    """The model with weights and inputs of some layers quantized, calibrated."""
    for name, width in bits.items():
        layer = model.get_submodule(name)
        swap(
            layer, {"weight": Uniform(width, layer.weight.shape, signed=True), "input": Uniform(width, range=MinMax())}
        )
    calibrate(model, [images], progress=False)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def db(exact: torch.Tensor, other: torch.Tensor) -> float:
    return 10 * math.log10(float(exact.double().square().sum() / (exact - other).double().square().sum()))


def test_local_is_on_float_inputs_and_total_is_what_has_added_up(residual, images):
    model = quantized(residual, images, {"stem": 4, "conv": 3})
    depth, own, measured = errors_by_depth(model, images)
    assert measured == measure(model, images)
    assert [d["layer"] for d in depth] == ["stem", "conv"] and own.keys() == {("stem", "input"), ("conv", "input")}
    seen: dict[str, torch.Tensor] = {}
    model.conv.register_forward_hook(lambda _, args, y: seen.update(input=args[0].clone(), output=y.clone()))
    with torch.no_grad():
        with quantizers_off(model):
            model(images)
        exact = dict(seen)
        model(images)
        alone = type(model.conv).forward(model.conv, exact["input"])
    assert depth[1]["local"] == pytest.approx(db(exact["output"], alone), abs=1e-6)
    assert depth[1]["total"] == pytest.approx(db(exact["output"], seen["output"]), abs=1e-6)
    assert depth[1]["total"] < depth[1]["local"] and depth[0]["local"] == pytest.approx(depth[0]["total"])
    x = exact["input"]
    assert own["conv", "input"]["sqnr_float"] == pytest.approx(db(x, model.conv.input_quantizer(x).detach()), abs=1e-3)


def test_what_is_held_is_bounded_and_the_model_stays_as_it_was(residual, images):
    model = quantized(residual, images, {"stem": 4, "conv": 3}).train()
    before = copy.deepcopy(model.state_dict())
    few, _, measured = errors_by_depth(model, images, budget=1)
    one, _, _ = errors_by_depth(model, images[:1])
    assert few == one, "with no room for more, one image is looked at"
    assert measured == measure(model, images), "measures are of all images all the same"
    assert model.training and model.stem.enabled and not model.stem._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_error_and_no_signal_are_no_number():
    zero, one = torch.zeros(3), torch.ones(3)
    for exact, other in ((zero, one), (one, one)):
        sums = Sums()
        sums.add(exact, other)
        assert sums.sqnr() is None


def test_drift_is_in_standard_deviations_and_as_a_factor(residual, images):
    drift = {d["layer"]: d for d in norm_drift(residual, images)}
    with torch.no_grad():
        x = residual.stem(images)
        bn = residual.bn1
        deviation = (bn.running_var + bn.eps).sqrt()
        shift = ((x.mean((0, 2, 3)) - bn.running_mean).abs() / deviation).mean()
        ratio = (x.var((0, 2, 3), unbiased=False) + bn.eps).sqrt() / deviation
    assert list(drift) == ["bn1", "bn2", "bn3"]
    assert drift["bn1"]["shift"] == pytest.approx(float(shift), rel=1e-4)
    assert drift["bn1"]["spread"] == pytest.approx(float(ratio.log().abs().mean().exp()), rel=1e-4)


def test_statistics_that_are_what_arrives_do_not_drift(residual, images):
    for name in ("bn1", "bn2", "bn3"):  # in order, since each changes what arrives at the next
        norm, x = residual.get_submodule(name), []
        handle = norm.register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
        with torch.no_grad():
            residual(images)
        handle.remove()
        norm.running_mean.copy_(x[0].mean((0, 2, 3)))
        norm.running_var.copy_(x[0].var((0, 2, 3), unbiased=False))
    for norm in norm_drift(residual, images):
        assert norm["shift"] < 1e-4 and norm["spread"] == pytest.approx(1, abs=1e-4)


def test_one_large_channel_does_not_hide_the_others(residual, images):
    with torch.no_grad():
        residual.conv.weight[3] *= 1000
    model = quantized(residual, images, {"conv": 8})
    seen = calibrate(model, [images], progress=False)
    found = channel_measures(model, "conv", "weight", model.conv.weight_quantizer, seen)
    reach = model.conv.weight.detach().flatten(1).abs().amax(1)
    assert found["channel_spread"] == pytest.approx(float(reach.max() / reach.median()), rel=1e-5)
    assert found["sqnr_channel"] == pytest.approx(0, abs=1e-6), "every other channel is rounded to zero"
    whole = db(model.conv.weight.detach(), model.conv.weight_quantizer(model.conv.weight).detach())
    assert whole > 30, "which the error of the whole tensor does not show"
    x = channel_measures(model, "conv", "input", model.conv.input_quantizer, seen)
    assert 1 <= x["channel_spread"] < 100 and 10 < x["sqnr_channel"] < 60
