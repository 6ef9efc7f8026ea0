"""Whole runs: proofs on real digits, integer rounding, exports of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from qexp.errors import QexpError
from qexp.integer import code_layer, int8
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


@pytest.mark.skipif(not int8.available(), reason="no 8-bit dot products")
def test_an_evaluation_on_codes_is_its_own_point(run, caplog, monkeypatch):
    built = []
    weight = code_layer._weight
    monkeypatch.setattr(code_layer, "_weight", lambda layer: built.append(layer) or weight(layer))
    on_codes = run("quant=minmax", "bits=w4a4", "evaluate=codes")
    assert len(built) == len(set(map(id, built))) == 5, "each layer is made ready once"
    assert on_codes["status"] == "ok" and on_codes["evaluate"] == "codes" and on_codes["products_on_codes"] == 100
    assert "evaluate=codes: 100.0 % of the products on codes" in caplog.text
    plain = run("quant=minmax", "bits=w4a4")
    assert (
        plain["point"] != on_codes["point"]
        and "evaluate" not in plain
        and abs(plain["value"] - on_codes["value"]) < 0.5
    )
    assert run("quant=minmax", "bits=w4a4", "evaluate=float")["point"] == plain["point"]
    with pytest.raises(QexpError, match="evaluate=byte is not allowed; use float"):
        run("evaluate=byte")
    with pytest.raises(QexpError, match="evaluate=codes is not allowed with rounding=integer; leave out one of them"):
        run("evaluate=codes", "rounding=integer")


def test_narrow_accumulators_cost_accuracy(run, tmp_path: Path):
    metrics = run("quant=minmax", "verify=100", "accumulator=[8,24]")
    table = pd.read_csv(tmp_path / "runs" / "digits_cnn-digits" / metrics["point"] / "accumulator.csv")
    assert list(table.bits) == [8, 8, 24, 24] and list(table.overflow) == ["saturate", "wrap"] * 2
    narrow, wide = table[table.bits == 8], table[table.bits == 24]
    assert (wide.overflows == 0).all() and (wide.value == metrics["value_integer"]).all()
    assert (narrow.overflows > 0).all() and (narrow.share > 1).all() and (narrow.value < wide.value.max()).all()
    assert metrics["accumulator"]["24 wrap"] == metrics["value_integer"]
    with pytest.raises(QexpError, match="accumulator=80 is not allowed; use a whole number from 2 to 64"):
        run("verify=8", "accumulator=[80]")


def test_deploy_makes_fixed_point_lowerable(run):
    refused = run("quant=fixed_point", "bits=fx8", "verify=8")
    assert refused["status"] == "failed"
    assert (
        "conv1: cannot be lowered to integers: the images are not quantized; give the first layer's input bits"
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
    assert kept["verify_images"] == 40


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export=verfy"], "export=verfy .did you mean 'verify'"),
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
    with pytest.raises(
        QexpError, match=r"rounding=int \(did you mean 'integer'\?\) is not allowed; use float or integer"
    ):
        run("rounding=int")


def test_integers_that_are_another_network_than_the_evaluated_one_are_told(run, digits_weights, tmp_path, caplog):
    """A channel that reaches ten million below zero (and never fires) makes the one step of the sum coarse for all others."""
    from safetensors.torch import load_file, save_file

    from qexp.run.integer_proof import FAR

    words = "of the codes differ from those of the network as it was evaluated"
    assert run("quant=minmax", "verify=32")["verify_codes_differ_real_scales"] < FAR and words not in caplog.text
    weights = load_file(digits_weights)
    weights["bn3.bias"][0] = -1e7
    save_file(weights, tmp_path / "dead.safetensors")
    found = run("quant=minmax", "verify=32", f"weights={tmp_path / 'dead.safetensors'}")
    assert found["verify"] == "equal" and found["verify_codes_differ_real_scales"] > FAR
    assert words in caplog.text and "evaluate with rounding=integer" in caplog.text
    assert f"{found['verify_codes_differ_real_scales']:.1f} %" in caplog.text


def test_a_proof_on_fewer_images_than_asked_for_says_how_many_there_are(run, caplog):
    found = run("quant=minmax", "verify=1000")
    assert found["verify_images"] == 200
    assert "verify=1000: the test set has 200 images (max_samples=200); all of them were compared" in caplog.text
