"""A method's declared capabilities: checked once in the base class, readable by callers, one name for the first range."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import qexp.quantizers
from qexp.calibration.calibrate import wanted
from qexp.command.keys import check_key
from qexp.errors import RENAMED, QexpError
from qexp.network.facts import facts
from qexp.network.linking import _one_after
from qexp.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from qexp.quantizers.base import ROUNDINGS, GridQuantizer, Quantizer
from qexp.ranges import MSE, Clip, MinMax
from qexp.recipe import Recipe, apply, resolve
from qexp.statistics.stats import TensorStats

CONF = Path(__file__).parents[2] / "conf"
X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
KINDS = {"tensor": PerTensor(), "channel": PerChannel(0), "group": PerGroup(8)}


def methods() -> dict[str, type[Quantizer]]:
    """Every class of the package that can be made."""
    found = {}
    for module in pkgutil.iter_modules(qexp.quantizers.__path__, "qexp.quantizers."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if isinstance(kind, type) and issubclass(kind, Quantizer) and not name.startswith("_"):
                found[name] = kind
    bases = {"Quantizer", "GridQuantizer", "AffineQuantizer", "BinaryWeight"}
    return {name: kind for name, kind in sorted(found.items()) if name not in bases}


METHODS = methods()
every = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)


def made(kind: type[Quantizer], **options) -> Quantizer:
    return kind(min(max(4, kind.bits_allowed[0]), kind.bits_allowed[1]), (4, 4, 4, 4), **options)


@every
def test_what_a_method_does_not_declare_it_refuses_in_the_same_words(kind):
    for name, granularity in KINDS.items():
        if name in kind.granularities:
            assert made(kind, granularity=granularity).granularity == granularity
        else:
            with pytest.raises(QexpError, match=rf"{kind.__name__}: granularity={granularity} is not allowed; use "):
                made(kind, granularity=granularity)
    for rounding in (*ROUNDINGS, "up"):
        if rounding in kind.roundings:
            assert made(kind, rounding=rounding).rounding == rounding
        else:
            with pytest.raises(QexpError, match=rf"rounding={rounding} is not allowed; use {kind.roundings[0]}"):
                made(kind, rounding=rounding)
    assert made(kind).rounding == kind.roundings[0]


def test_the_blocks_of_a_transposed_convolution_count_as_channels():
    for kind in METHODS.values():
        if kind.granularities == ("tensor",):
            with pytest.raises(QexpError, match="granularity=blocks:2 is not allowed; use tensor"):
                made(kind, granularity=PerBlock(blocks=2))


@every
def test_the_first_range_has_one_name(kind):
    assert {"bits", "shape", "granularity", "rounding"} <= set(kind.arguments())
    renamed = set(RENAMED) - {"clip"} if kind.__name__ == "MidTread" else set(RENAMED)  # it clips, or does not
    assert not renamed & set(kind.arguments())


NEW = "qexp.quantizers."


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_target_": NEW + "lsq.LSQ", "init": {"_target_": "qexp.ranges.MSE"}}, r"init is now called range$"),
        ({"_target_": NEW + "pact.PACT", "alpha_init": 6.0}, r"alpha_init is now called range$"),
        ({"_target_": NEW + "dorefa.DoReFaInput", "k": 0.1}, r"k is now called range$"),
        ({"_target_": NEW + "exponential.Exponential", "clip": 2.0}, r"clip is now called range$"),
        (
            {"_target_": NEW + "sigmoid_surrogate.SigmoidSurrogate", "alpha_init": 1.0},
            r"alpha_init is now called range",
        ),
        ({"_target_": NEW + "ewgs.EWGSInput", "init": 1.0}, r"takes no argument 'init'; allowed are .*unscale"),
        (
            {"_target_": NEW + "lsq.LSQ", "scale_nummel": "batch"},
            r"takes no argument 'scale_nummel'; allowed .*scale_numel",
        ),
    ],
)
def test_an_old_name_in_a_recipe_is_answered_with_the_new_one(spec, message):
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).eval()
    structure = facts(model, X)
    with pytest.raises(QexpError, match=r"0 \(input\): .*" + message):
        apply(model, resolve(model, structure, Recipe({"input": spec}, abit=4)), structure)


@pytest.mark.parametrize("key", ["quant.input.alpha_init", "quant.weight.init", "quant.input.k", "quant.output.clip"])
def test_an_old_name_on_the_command_line_is_answered_with_the_new_one(key):
    with pytest.raises(QexpError, match=f"{key.split('.')[-1]} is now called range"):
        check_key(key, [CONF])
    check_key("quant.weight.clip", [CONF])  # of midtread, where it is no range


def planned(**input_spec) -> tuple[nn.Module, object, object]:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    structure = facts(model, X)
    plan = resolve(model, structure, Recipe({"input": input_spec}, abit=4))
    apply(model, plan, structure)
    return model, structure, plan


@pytest.mark.parametrize(
    ("target", "rule"),
    [("lsq.LSQ", "range"), ("lsq_plus.LSQPlus", "range"), ("tqt.TQT", "range"), ("uniform.Uniform", "range")],
)
def test_the_rule_of_every_method_is_asked_for_histograms(target, rule):
    """Histograms per channel cost memory and time; a rule that reads ends or sums alone needs none, whichever method holds it."""
    for name, needs in (("MSE", True), ("MinMax", False), ("Percentile", True)):
        spec = {"_target_": NEW + target, "granularity": "channel", rule: {"_target_": f"qexp.ranges.{name}"}}
        assert wanted(planned(**spec)[0])[0] is needs, (target, name)


def test_a_number_needs_no_histogram_and_an_own_rule_that_says_nothing_may():
    uniform = METHODS["Uniform"]
    assert not METHODS["PACT"](4, (4,), range=6.0).needs_histogram
    assert uniform(4, (4,), range=lambda stats, grid, context: (stats.min, stats.max)).needs_histogram
    assert (
        uniform(4, (4,), range=Clip("mix")).needs_histogram
        and not uniform(4, (4,), range=Clip("laplace")).needs_histogram
    )
    assert METHODS["APoTInput"](4, (4,), range="mse").needs_histogram
    assert uniform(4, (4,), range=MSE()).needs_histogram and not uniform(4, (4,), range=MinMax()).needs_histogram


def test_the_plan_names_the_rule_of_every_method():
    rule = {"_target_": "qexp.ranges.MinMax"}
    for target in ("exponential.Exponential", "dorefa.DoReFaInput", "pact.PACT", "lcq.LCQ", "gemmlowp.GEMMLOWP"):
        _, _, plan = planned(_target_=NEW + target, range=rule)
        assert set(plan.frame().query("site == 'input'").range) == {"minmax"}, target


@pytest.mark.parametrize(("symmetric", "target"), [(True, "uniform.Uniform"), (False, "gemmlowp.GEMMLOWP")])
def test_an_integer_batch_norm_takes_no_step_from_a_method_with_a_zero_point(symmetric, target):
    model, structure, _ = planned(_target_=NEW + target)
    found = _one_after(model, structure, "1")
    assert (found is not None) is symmetric
    if found is not None:
        assert found.symmetric


@every
def test_symmetric_methods_have_no_zero_point(kind):
    q = made(kind)
    if not (isinstance(q, GridQuantizer) and q.symmetric and "half_step" in q.properties):
        return
    w = X.reshape(-1)[:256].reshape(4, 4, 4, 4) - 1 if X.numel() >= 256 else torch.randn(4, 4, 4, 4) - 1
    try:
        q.fit(TensorStats.of(w, q.granularity))
    except KeyError as missing:  # a method that needs what calibration collects beside
        pytest.skip(str(missing))
    assert not bool(torch.as_tensor(q.zero_point).any())


def test_recipes_use_the_one_name():
    old = re.compile(r"^(init|alpha_init|k)$")

    def names(node) -> list[str]:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        own = list(node) if isinstance(node, dict) and str(node.get("_target_", "")).startswith(NEW) else []
        return own + [name for part in inner for name in names(part)]

    for file in (CONF / "quant").rglob("*.yaml"):
        assert not [name for name in names(yaml.safe_load(file.read_text())) if old.match(str(name))], file
