"""A network broken in one place: the diagnosis names that place, its cause and a remedy; for a sound network it is empty."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from qexp.analysis.diagnosis import diagnose
from qexp.layers import quantizers
from qexp.run import float_network, pipeline

TENSOR = ("quant=minmax", "quant.weight.granularity=tensor", "schedule=ptq", "layer_wbit=4", "layer_abit=8", "study=s")


@pytest.fixture
def broken(run, monkeypatch):
    """Call with a function that breaks a model, a moment (`float` weights, or `fitted` quantizers) and overrides; the metrics."""

    def one(breaking, moment: str, *overrides: str) -> dict:
        with monkeypatch.context() as patched:
            if moment == "float":
                float_model = float_network.float_model

                def changed(*args):
                    model = float_model(*args)
                    breaking(model)
                    return model

                patched.setattr(float_network, "float_model", changed)
            else:
                find_ranges = pipeline.find_ranges

                def fitted(experiment):
                    find_ranges(experiment)
                    breaking(experiment.model)

                patched.setattr(pipeline, "find_ranges", fitted)
            metrics = run(*overrides)
        assert metrics["status"] == "ok", metrics["error"]
        return metrics

    return one


@torch.no_grad()
def outlier_channel(model) -> None:
    """One output channel of conv3 a thousand times as large, its batch norm making up for it: the float network is the same."""
    model.conv3.weight[2] *= 1000
    model.bn3.running_mean[2] *= 1000
    model.bn3.running_var[2] *= 1_000_000


def test_an_outlier_channel_is_found(broken, run, tmp_path):
    sound = run(*TENSOR)
    assert sound["diagnosis"] == [] and sound["value"] > 60
    metrics = broken(outlier_channel, "float", *TENSOR, "bn=keep", "force=true")
    assert metrics["value_float"] == pytest.approx(sound["value_float"], abs=0.6)
    fell, cause, *_ = metrics["diagnosis"]
    assert "fell from" in fell and "one scale serves channels of very different size" in cause
    assert "in 1 tensor: conv3 weight (" in cause and "granularity=channel" in cause and 'layers: "conv3"' in cause
    healed = broken(outlier_channel, "float", *TENSOR, "bn=keep", "quant.weight.granularity=channel")
    assert healed["diagnosis"] == [] and healed["value"] > 60, "the remedy it names is one"
    depth = json.loads((tmp_path / "runs" / "s" / metrics["point"] / "depth.json").read_text())
    assert [d["layer"] for d in depth["layers"]] == ["conv1", "conv2", "conv3", "conv4", "fc"]
    assert [n["layer"] for n in depth["norms"]] == ["bn1", "bn2", "bn3", "bn4"]


def test_a_range_that_cuts_off_is_found(broken):
    def clip(model) -> None:
        for name, site, q in quantizers(model):
            if (name, site) == ("conv4", "input"):
                q.scale.div_(60)

    metrics = broken(clip, "fitted", *TENSOR)
    assert "the range cuts off many values, in 1 tensor: conv4 input (" in metrics["diagnosis"][1]
    assert "most of the error arises in conv4" in metrics["diagnosis"][-1]


def test_levels_that_lie_unused_are_found(broken):
    def widen(model) -> None:
        for name, site, q in quantizers(model):
            if (name, site) == ("conv2", "input"):
                q.scale.mul_(400)

    metrics = broken(widen, "fitted", *TENSOR)
    assert "most levels are unused, in 1 tensor: conv2 input (" in metrics["diagnosis"][1]
    assert "quant=mse" in metrics["diagnosis"][1]


def test_drifted_batch_norms_are_found(broken):
    def shift(model) -> None:
        model.bn2.running_mean.add_(30 * model.bn2.running_var.sqrt())

    metrics = broken(shift, "fitted", *TENSOR, "bn=keep")
    assert (
        "running statistics of" in metrics["diagnosis"][1]
        and ": bn2 (means off by 30 deviations" in metrics["diagnosis"][1]
    )


def test_a_narrow_network_is_told_so(run):
    metrics = run("quant=mse", "schedule=ptq", "layer_wbit=2", "layer_abit=1", "study=s", "quant.input.symmetric=true")
    assert "too few bits" in metrics["diagnosis"][1] and "schedule=qat" in metrics["diagnosis"][1]


def table(**changes) -> pd.DataFrame:
    row = {"layer": "a", "site": "weight", "quantizer": "lsq", "granularity": "tensor", "bits": 4, "sqnr": 18.0}
    return pd.DataFrame([row | {"saturation": 0.1, "levels_used": 16, "levels": 16} | changes])


def history(scales: tuple[float, ...], oscillating: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"step": i, "layer": "a", "site": "weight", "scale": s, "oscillating": oscillating}
            for i, s in enumerate(scales)
        ]
    )


COLLAPSED = {"value": 10.0, "value_float": 90.0, "metric": "top1"}


def test_what_training_did_is_told():
    ran = diagnose(COLLAPSED, table(), history=history((0.1, 0.2, 4.0)))
    assert any("training moved the scale far" in line and "a weight (40x)" in line for line in ran)
    restless = diagnose(COLLAPSED, table(), history=history((0.1, 0.1), oscillating=30.0))
    assert any("weights oscillate" in line and "a weight (30 % of the weights)" in line for line in restless)
    gap = diagnose(COLLAPSED | {"train_value": 80.0}, table())
    assert any("reaches 80.0 % in training mode" in line for line in gap)
    calm = diagnose(COLLAPSED, table(), history=history((0.1, 0.12)))
    assert len(calm) == 2 and "no single tensor is the cause" in calm[1], "nothing is made up"


def test_the_costliest_cause_comes_first():
    both = pd.concat([table(sqnr=12.0, saturation=20.0), table(layer="b", sqnr=-20.0, channel_spread=50.0)])
    lines = diagnose(COLLAPSED, both)
    assert "b weight" in lines[1] and "a weight" in lines[2]
    norms = [{"layer": "n", "shift": 100.0, "spread": 1.0}]
    assert "batch norm" in diagnose(COLLAPSED, both, norms=norms)[1]


def test_a_sound_network_and_an_accuracy_that_is_no_number(tmp_path: Path):
    assert diagnose(COLLAPSED | {"value": 88.0}, table()) == []
    assert diagnose(COLLAPSED | {"value": None}, table()) == ["top-1 is not a number"]


def test_histories_are_written_and_resume(run, tmp_path):
    metrics = run("quant=lsq", "bits=w4a4", "schedule.epochs=2", "trainer.limit_train_batches=4", "study=s")
    frame = pd.read_csv(tmp_path / "runs" / "s" / metrics["point"] / "history.csv")
    assert len(frame[frame.step == 0]) == 10 and frame.step.max() == 8
    assert {"scale", "sqnr", "saturation", "levels_used", "oscillating"} <= set(frame.columns)
    assert frame[(frame.site == "weight") & (frame.step > 0)].oscillating.notna().all()
    assert (frame[frame.layer == "conv2"].groupby("site").scale.nunique() > 1).all(), "the scales move"
    without = run(
        *("quant=lsq", "bits=w4a4", "schedule.epochs=2", "trainer.limit_train_batches=4", "study=t"),
        "callbacks.history=null",
    )
    assert without["value"] == metrics["value"] and without["worst_sqnr"] == metrics["worst_sqnr"], (
        "looking changes nothing"
    )
