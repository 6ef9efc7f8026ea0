"""The ACIQ recipes on the digits: what is quantized where, what the options change, and that every rung runs."""

import pandas as pd
import pytest
import torch

from qexp.data.digits import Digits
from qexp.models.digits_cnn import DigitsCNN
from qexp.models.zoo import torchvision_model
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import resolve
from qexp.run.pipeline import recipe
from qexp.run.settings import read

RUNGS = ["naive", "clip", "alloc", "bias", "full"]


@pytest.fixture
def plan_of(compose):
    """Call with overrides; returns the plan for the digits network, batch norms folded."""

    def plan(*overrides: str):
        model, example = DigitsCNN(width=8).eval(), Digits().example()
        fold_bn(model, facts(model, example))
        return resolve(model, facts(model, example), recipe(read(compose("bits=w4a4", *overrides))))

    return plan


def test_results_and_weights_are_quantized_once_and_the_ends_at_eight_bits(plan_of):
    plan = plan_of("quant=ladder/aciq/naive")
    assert plan.bits("output") == {"conv1": 8, "conv2": 4, "conv3": 4, "conv4": 4, "pool2": 8, "fc": 8}
    assert plan.bits("weight") == {"conv1": 8, "conv2": 4, "conv3": 4, "conv4": 4, "fc": 8}
    assert all(entry.spec is None for entry in plan if entry.site == "input")
    assert plan.bits("input") == {"conv1": 32, "conv2": 8, "conv3": 4, "conv4": 32, "fc": 8}
    assert plan["fc", "output"].spec["range"]["_target_"].endswith("MinMax")
    assert plan["fc", "output"].spec["granularity"] == "tensor"
    assert plan["conv1", "output"].by == "quant.rules.ends" and plan["pool2", "output"].by == "quant.rules.pooling"


def test_inception_keeps_the_weights_of_two_convolutions(compose):
    model, example = torchvision_model("inception_v3", 10, init_weights=False).eval(), torch.zeros(1, 3, 75, 75)
    fold_bn(model, facts(model, example))
    structure = facts(model, example)

    def plan(quant: str, *overrides: str):
        return resolve(
            model, structure, recipe(read(compose(f"quant={quant}", "model=inception_v3", "bits=w4a4", *overrides)))
        )

    first, second, last = "Conv2d_1a_3x3.conv", "Conv2d_2a_3x3.conv", "fc"
    for rung in RUNGS:
        bits = plan(f"ladder/aciq/{rung}").bits("weight")
        assert {name for name, width in bits.items() if width == 8} == {first, second, last}
        assert len(bits) == 95 and set(bits.values()) == {4, 8}
        assert (
            plan(f"ladder/aciq/{rung}")[first, "output"].bits == 8
            and plan(f"ladder/aciq/{rung}")[second, "output"].bits == 4
        )
    assert plan("ladder/aciq/clip", "ends_bit=null").bits("weight")[second] == 4
    assert plan("minmax").bits("weight")[second] == 4, "the rule is ACIQ's own"


def test_adds_are_quantized_on_request(plan_of):
    plan = plan_of("quant=ladder/aciq/clip", "quant.rules.adds.output.bits=5")
    assert plan["add", "output"].bits == 5 and plan["add", "output"].spec["range"]["kind"] == "laplace"
    assert plan["conv4", "input"].bits == 5 and plan["conv4", "input"].by == "quantized at add (output)"


def test_ends_and_pooling_follow_ends_bit(plan_of):
    assert set(plan_of("quant=ladder/aciq/naive", "ends_bit=null").bits("output").values()) == {4}
    plan = plan_of("quant=ladder/aciq/naive", "bits=float")
    assert not [entry for entry in plan if entry.spec is not None]


def test_a_list_sets_the_results_that_feed_each_group(plan_of):
    plan = plan_of("quant=ladder/aciq/naive", "layer_abit=[32,3,32,5]")
    assert plan["conv1", "output"].bits == plan["conv2", "output"].bits == 3 and plan["pool2", "output"].bits == 5


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_runs_and_reports_its_steps(rung, run):
    metrics = run(f"quant=ladder/aciq/{rung}", "bits=w4a4")
    assert metrics["status"] == "ok" and metrics["value"] > 50
    assert ("allocated_bits_weight" in metrics) == (rung in ("alloc", "full"))
    assert ("corrected_weights" in metrics) == (rung in ("bias", "full"))
    if rung == "full":
        assert metrics["allocated_bits_weight"] == 4 and 3.9 < metrics["allocated_bits_output"] <= 4
        assert metrics["corrected_weights"] == 5


@pytest.mark.parametrize("kind", ["gauss", "exact", "std:2.5", "ratio:0.6", "mix", "kld"])
def test_every_clip_kind_runs(kind, run):
    assert run("quant=ladder/aciq/clip", "bits=w4a4", f"quant.output.range.kind={kind}")["value"] > 40


@pytest.mark.parametrize(
    "options",
    [
        ["quant.output.ranges=dynamic"],
        ["quant.output.zero_point=unclamped", "quant.weight.zero_point=unclamped"],
        ["quant.weight.preserve_zero=false"],
        ["quant.output.noise=uniform"],
        ["quant.output.pow2_scale=true"],
    ],
)
def test_every_option_of_the_quantizer_is_reached_from_the_shell(options, run):
    assert run("quant=ladder/aciq/clip", "bits=w8a8", *[f"++{option}" for option in options])["value"] > 60


def test_the_activation_analysis_flags_itself(run):
    hook = "{_target_: qexp.passes.activation_correction.ActivationCorrection}"
    metrics = run("quant=ladder/aciq/full", "bits=w4a4", f"quant.passes.activation_correction={hook}")
    assert metrics["status"] == "ok" and metrics["hardware"].startswith("not_mappable")


def test_the_written_plan_reads_back(run, tmp_path):
    first = run("quant=ladder/aciq/full", "bits=w4a4")
    path = next((tmp_path / "runs").rglob(f"{first['point']}/layers.csv"))
    assert set(pd.read_csv(path).query("site == 'output'").bits) == {4, 8}
    again = run("quant=ladder/aciq/full", "bits=w4a4", f"plan={path}")
    assert again["status"] == "ok" and again["value"] == first["value"]


def test_the_evaluated_network_is_deterministic(run):
    torch.manual_seed(5)
    assert (
        run("quant=ladder/aciq/full", "bits=w3a3")["value"]
        == run("quant=ladder/aciq/full", "bits=w3a3", "force=true")["value"]
    )
