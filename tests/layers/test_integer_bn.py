"""Batch norm in integer constants: the published vector, and a network with it against the same network without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers import check_all_ran, quantizers_off
from qexp.layers.integer_bn import IntegerBatchNorm2d, bn_constants
from qexp.layers.swap import swap
from qexp.network.facts import facts
from qexp.numerics.fixed_type import shifted
from qexp.passes.base import PassContext
from qexp.passes.integer_layers import IntegerLayers
from qexp.recipe import Recipe, apply, resolve

MPACT = {
    "_target_": "qexp.quantizers.pact.PACT",
    "signed": True,
    "range": {"_target_": "qexp.ranges.MinMax"},
}
WEIGHT = {"_target_": "qexp.quantizers.dorefa.DoReFaWeight", "variant": "symmetric", "rescale": "max"}
TARGET = "qexp.layers.integer_bn.INTEGER_BN"


@pytest.mark.parametrize(
    ("intbit", "bit", "constants", "results"),
    [
        (16, 32, (413, 291314), [(12345, "trunc", 82), (-8000, "trunc", -45), (-8000, "half_even", -46)]),
        (8, 16, (2, 1138), [(12345, "trunc", 100)]),
    ],
)
def test_vector(intbit, bit, constants, results):
    s_a, s_w, s_out = 127 / 2, 127, 127 / 4
    bn = (*(torch.tensor([v], dtype=torch.float64) for v in (0.8, 0.3, 0.1, 0.25)), 1e-5)
    k, t = bn_constants(bn, s_out / (s_a * s_w), s_out, bit, intbit)
    assert (int(k), int(t)) == constants
    for acc, rounding, y in results:
        assert int(shifted(acc * k + t, bit - intbit, rounding)) == y


def quantized(model: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    """Returns the network with mPACT and, where options are given, integer batch norms, in evaluation mode."""
    rules = {"bn": {"types": ["BatchNorm2d"], "compute": {"_target_": TARGET, **options}}} if options else {}
    structure = facts(model, x)
    sites = {"input": MPACT, "weight": WEIGHT}
    apply(model, resolve(model, structure, Recipe(sites=sites, rules=rules, wbit=8, abit=8)), structure)
    calibrate(model, [x], followed_by_relu=structure.followed_by_relu, progress=False)
    context = PassContext(structure, [x], {})
    IntegerLayers().on_fitted(model, context)
    model.findings = context.findings
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(3)
    return torch.randn(4, 3, 8, 8)


def test_many_bits_compute_what_the_float_batch_norm_does(residual, images):
    plain, exact = (
        quantized(copy.deepcopy(residual), images),
        quantized(residual, images, bit=40, intbit=16, rounding="half_even"),
    )
    with torch.no_grad():
        a, b = plain(images), exact(images)
    # half to even on the way into the next quantizer's codes is what that quantizer does itself, away from ties
    assert torch.allclose(a, b, atol=2e-2 * float(a.abs().max())) and not torch.equal(b, torch.zeros_like(b))


@pytest.mark.parametrize("affine", [True, False])
def test_a_bias_before_it_and_no_factors_in_it_change_nothing(affine, images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Conv2d(4, 2, 3)).eval()
    nn.init.uniform_(model[1].running_mean, -0.3, 0.3)
    plain = quantized(copy.deepcopy(model), images)
    exact = quantized(model, images, bit=40, intbit=16, rounding="half_even")
    with torch.no_grad():
        a, b = plain(images), exact(images)
    assert torch.allclose(a, b, atol=2e-2 * float(a.abs().max()))


def test_results_are_codes_of_the_next_quantizer(residual, images):
    model = quantized(residual, images, bit=32, intbit=16)
    seen = {}
    for name in ("bn1", "bn2", "bn3"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y, n=name: seen.__setitem__(n, y))
    with torch.no_grad():
        model(images)
    assert model.bn2.steps.leaving is model.grouped.input_quantizer, "past its ReLU"
    codes = seen["bn2"] / model.grouped.input_quantizer.scale
    assert torch.allclose(codes, codes.round(), atol=1e-4) and codes.min() >= -128 and codes.max() <= 127
    assert model.bn3.steps.leaving is None, "its result goes into a float sum, so it stays wide"
    unit = model.bn3._unit().reshape(1, -1, 1, 1)
    assert torch.allclose(seen["bn3"] / unit, (seen["bn3"] / unit).round(), atol=1e-2)


def test_truncation_never_rounds_away_from_zero(residual, images):
    nearest = quantized(copy.deepcopy(residual), images, bit=32, intbit=16, rounding="half_even")
    toward = quantized(residual, images, bit=32, intbit=16, rounding="trunc")
    x = torch.randn(4, 8, 8, 8)
    with torch.no_grad():
        off = (nearest.bn2(x).abs() - toward.bn2(x).abs()) / toward.grouped.input_quantizer.scale
    assert off.min() > -0.01 and 0.2 < float((off > 0.5).double().mean()) < 0.8


def test_few_fraction_bits_lose_factors_and_say_so(residual, images):
    model = quantized(residual, images, bit=12, intbit=8)
    assert model.findings["bn_factors_vanished"] > 0 and model.findings["accumulator_bits"] > 2


def test_clamp_source_has_one_code_more_than_the_training(residual, images):
    source = quantized(copy.deepcopy(residual), images, clamp="source")
    training = quantized(residual, images, clamp="match_training")
    q = source.depthwise.input_quantizer
    assert source.bn1._limits(q) == (-128, 127) and training.bn1._limits(q) == (-127, 127)


@pytest.mark.parametrize(("clamp", "least"), [("source", -128), ("match_training", -127)])
def test_its_own_output_quantizer_sees_it_and_bends_to_the_clamp(residual, images, clamp, least):
    structure = facts(residual, images)
    compute = {"_target_": TARGET, "intbit": 16, "clamp": clamp}
    rules = {"bn": {"layers": "bn3", "compute": compute, "output": {**MPACT, "range": 0.1}}}
    recipe = Recipe(sites={"input": MPACT, "weight": WEIGHT}, rules=rules, wbit=8, abit=8)
    apply(residual, resolve(residual, structure, recipe), structure)
    calibrate(residual, [images], progress=False)
    check_all_ran(residual.eval(), images)
    q, seen = residual.bn3.output_quantizer, []
    assert residual.bn3.steps.leaving is q
    residual.bn3.register_forward_hook(lambda _, __, y: seen.append(y / q.scale))
    with torch.no_grad():
        residual(images)
    assert (float(seen[0].min()), float(seen[0].max())) == pytest.approx((least, 127))


def test_training_and_the_float_network_use_the_ordinary_batch_norm(residual, images):
    float_model = copy.deepcopy(residual)
    model = quantized(residual, images, bit=32, intbit=16)
    with quantizers_off(model), torch.no_grad():
        assert torch.equal(model(images), float_model.eval()(images))
    model.train()
    model(images).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.bn1.parameters())


def test_without_units_it_refuses_by_name(residual, images):
    alone = nn.BatchNorm2d(3).eval()
    swap(alone, {}, {"_target_": TARGET})
    with pytest.raises(QexpError, match="before it was linked to the quantizers around it"):
        alone(images)
    structure = facts(residual, images)
    rules = {
        "bn": {"types": ["BatchNorm2d"], "compute": {"_target_": TARGET}},
        "stem": {"layers": "stem", "weight": None},
    }
    recipe = Recipe(sites={"input": MPACT, "weight": WEIGHT}, rules=rules, wbit=8, abit=8)
    with pytest.raises(QexpError, match=r"bn1: the weights of the layer before are float"):
        apply(residual, resolve(residual, structure, recipe), structure)


@pytest.mark.parametrize(
    "wrong", [{"form": "wrap"}, {"rounding": "stochastic"}, {"clamp": "none"}, {"bit": 8, "intbit": 9}, {"bits": 8}]
)
def test_options_are_checked(wrong):
    layer = nn.BatchNorm2d(2)
    layer.__class__ = IntegerBatchNorm2d
    with pytest.raises(QexpError, match=r"allowed|takes no options"):
        layer.configure(**wrong)


def test_the_recipe_runs(run):
    metrics = run("quant=mpact_integer_bn", "schedule=ptq", "bn=keep", "bits=w8a8")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["value"] > 0.8 * metrics["value_float"] and metrics["accumulator_bits"] > 8
