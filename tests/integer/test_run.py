"""Whole runs: proofs on real digits, integer rounding, what a finished run can be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from qexp.integer.files import load


def test_a_run_is_proven(run, tmp_path: Path):
    metrics = run("quant=minmax", "verify=48")
    assert metrics["status"] == "ok" and metrics["verify"] == "equal" and metrics["verify_images"] == 48
    assert metrics["verify_codes_differ"] == metrics["verify_predictions_differ"] == 0
    assert 0 <= metrics["verify_codes_differ_real_scales"] < 0.1 and metrics["value_integer"] > 50
    folder = tmp_path / "runs" / "digits_cnn-digits" / metrics["point"]
    table = pd.read_csv(folder / "integer.csv")
    assert {"layer", "site", "bits", "codes", "differ", "most", "share_real_scales"} <= set(table)
    assert (table.differ == 0).all() and table.codes.min() > 0
    assert load(folder / "integer").about["quant"] == "minmax"


def test_integer_rounding_is_what_the_proof_computes(run):
    """200 images, evaluated with the program's rounding, are right where the integers are right."""
    metrics = run("quant=minmax", "bits=w4a4", "rounding=integer", "verify=200")
    assert metrics["value"] == metrics["value_integer"] and metrics["rounding"] == "integer"
    other = run("quant=minmax", "bits=w4a4")
    assert other["point"] != metrics["point"] and other["rounding"] == "half_even"
    assert abs(other["value"] - metrics["value"]) < 2


def test_narrow_accumulators_cost_accuracy(run, tmp_path: Path):
    metrics = run("quant=minmax", "verify=100", "accumulator=[8,24]")
    table = pd.read_csv(tmp_path / "runs" / "digits_cnn-digits" / metrics["point"] / "accumulator.csv")
    assert list(table.bits) == [8, 8, 24, 24] and list(table.overflow) == ["saturate", "wrap"] * 2
    narrow, wide = table[table.bits == 8], table[table.bits == 24]
    assert (wide.overflows == 0).all() and (wide.value == metrics["value_integer"]).all()
    assert (narrow.overflows > 0).all() and (narrow.share > 1).all() and (narrow.value < wide.value.max()).all()
    assert metrics["accumulator"]["24 wrap"] == metrics["value_integer"]
    assert "widths of 2..64 bits" in run("verify=8", "accumulator=[80]")["error"]


def test_deploy_makes_fixed_point_lowerable(run):
    refused = run("quant=fixed_point", "bits=fx8", "verify=8")
    assert refused["status"] == "failed"
    assert (
        "conv1: cannot be lowered to integers: the images arrive as floats; give the first layer's input bits"
        in refused["error"]
    )
    metrics = run("quant=fixed_point", "bits=fx8", "verify=32", "deploy=integer")
    assert metrics["verify"] == "equal" and metrics["verify_codes_differ_real_scales"] == 0


def test_a_finished_training_is_proven_afterwards(run, tmp_path: Path):
    trained = run("quant=lsq", "bits=w4a4", "schedule.epochs=1", "+trainer.limit_train_batches=3", "study=trained")
    folder = tmp_path / "runs" / "trained" / trained["point"]
    assert trained["status"] == "ok" and "verify" not in trained
    proven = run("export=verify", f"weights={folder}", "verify=40")
    assert proven["verify"] == "equal" and proven["verify_images"] == 40
    assert proven["value"] == trained["value"], "the network of the last checkpoint, not a new one"
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept["verify"] == "equal" and kept["value"] == trained["value"] and (folder / "integer.csv").exists()
    assert "verify" in (folder.parent / "results.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export=verfy"], "export='verfy'.*did you mean 'verify'"),
        (["export=verify"], "needs weights=<folder of a finished run>, got"),
        (["export=verify", "weights=null"], "needs weights=<folder of a finished run>, got None"),
    ],
)
def test_exports_that_cannot_be(run, overrides, message):
    import re

    metrics = run(*overrides)
    assert metrics["status"] == "failed" and re.search(message, metrics["error"])


def test_an_unfinished_run_is_refused(run, tmp_path: Path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("seed: 0\n")
    metrics = run("export=verify", f"weights={tmp_path / 'half'}")
    assert metrics["status"] == "failed" and "this run is not finished" in metrics["error"]


def test_an_unknown_rounding_is_refused(run):
    assert "rounding='int'; allowed are float, integer" in run("rounding=int")["error"]
