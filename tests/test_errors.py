"""Every mistake a user can make is answered with where it is, what was got, what is allowed and what to do."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from qexp.models.weights import save_weights
from qexp.run import pipeline
from qexp.run.settings import read
from tests.networks import Residual

ROOT = Path(__file__).parents[1]

MISTAKES = {
    "a pattern that matches nothing": (
        ["layer_wbit={cnov2: 4}"],
        ["layer_wbit", "'cnov2'", "matches no layer", "did you mean 'conv2'", "the model has"],
    ),
    "a rule's pattern that matches nothing": (
        ["+quant.rules.stem={layers: stem, weight: {bits: 4}}"],
        ["quant.rules.stem", "'stem'", "matches no layer", "such as conv1"],
    ),
    "a rule that is none": (["+quant.rules.wide=3"], ["quant.rules.wide=3 is not allowed; use a mapping"]),
    "bits outside the method's range": (
        ["quant=kmeans", "layer_wbit=9"],
        ["conv2 (weight)", "bits=9", "allowed are 1..8", "32 leaves the tensor in float"],
    ),
    "one bit for a signed uniform weight": (
        ["layer_wbit=1"],
        ["conv2 (weight)", "bits=1", "no positive level", "allowed are 2..16", "quant=dorefa"],
    ),
    "a list of the wrong length": (
        ["layer_abit=[32,8]"],
        ["layer_abit has 2 entries", "4 groups", "conv1, conv2 + conv3, conv4, fc", "'...' repeats"],
    ),
    "an unsigned quantizer that saw negatives": (
        ["quant.input.symmetric=true", "+quant.input.signed=false"],
        [
            "conv1 (input)",
            "unsigned quantizer received negative values (least -",
            "use signed: auto or true",
            "leave this tensor in float",
        ],
    ),
    "a rule that changes nothing": (
        ["layer_wbit=[8,4,4,8]", "+quant.rules.mid={layers: conv2, weight: {bits: 3}}"],
        ["quant.rules.mid changes nothing", "decided by layer_wbit[1]", "remove the rule or what overrules it"],
    ),
    "an argument no method knows": (["+quant.weight.roundign=floor"], ["conv1 (weight)", "roundign"]),
    "an unknown granularity": (
        ["quant.weight.granularity=row"],
        ["conv1 (weight)", "granularity: got 'row'", "allowed are tensor, channel, group:N"],
    ),
    "a missing weights file": (
        ["weights=nowhere/net.pth"],
        ["weights=nowhere/net.pth", "no such file", "Allowed: a file, a run folder"],
    ),
    "a missing plan": (["plan=nowhere/layers.csv"], ["plan=nowhere/layers.csv", "cannot be read"]),
    "a GPU that is not there": (["trainer=gpu"], ["trainer: No supported gpu backend found!", "use trainer=cpu"]),
    "a trainer's option that is none": (["+trainer.precison=16"], ["trainer: ", "takes no argument 'precison'"]),
    "no calibration images": (["n_calibrate=0"], ["0 calibration images asked for", "at least 1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_says_all_of_it(run, monkeypatch, mistake):
    overrides, parts = MISTAKES[mistake]
    if mistake == "a GPU that is not there":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    metrics = run("study=s", *overrides)
    assert metrics["status"] == "failed"
    assert metrics["error"].startswith("QexpError: "), metrics["error"]
    for part in parts:
        assert part in metrics["error"], metrics["error"]


@pytest.mark.parametrize("asked", ["trainer.accelerator=banana", "trainer.devices=none"])
def test_a_trainer_that_cannot_be_is_said_before_any_work(run, monkeypatch, asked):
    """Where float scores are kept, the first Trainer is made after calibration; from random weights, after the data and the network."""
    monkeypatch.setattr(pipeline.float_network, "float_model", lambda *_: pytest.fail("the network is at work"))
    assert run("study=s", asked)["error"].startswith("QexpError: trainer")


def test_a_checkpoint_that_does_not_fit(run, tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(Residual(), path)
    error = run("study=s", f"weights={path}")["error"]
    for part in ("does not fit DigitsCNN", "missing: conv1.weight", "unexpected", "Check model= and its arguments"):
        assert part in error, error


def test_an_earlier_runs_folder_gives_its_weights(run, tmp_path):
    """Those of a quantized run are the float weights beneath its scales and clips."""
    done = run("study=s", "schedule=qat", "schedule.epochs=1", "trainer.limit_train_batches=1", "quant=lsq")
    again = run("study=s", f"weights={tmp_path / 'runs' / 's' / done['point']}")
    assert again["status"] == "ok", again["error"]
    kept = torch.load(tmp_path / "runs" / "s" / done["point"] / "checkpoints" / "last.ckpt", weights_only=True)
    assert any("_quantizer." in key for key in kept["state_dict"])


def test_a_recipe_that_differs_from_the_checkpoints(run, tmp_path):
    """The point's hash keeps recipes apart; a checkpoint that came here another way is not taken for ours."""
    options = ("study=s", "schedule=qat", "schedule.epochs=1", "trainer.limit_train_batches=1", "quant=lsq")
    four = run(*options, "bits=w4a4")
    three = run(*options, "bits=w3a3")
    runs = tmp_path / "runs" / "s"
    for name, other in (("lsq", three), ("pact", run(*options, "quant=pact", "bits=w3a3"))):
        last = runs / other["point"] / "checkpoints" / "last.ckpt"
        last.write_bytes((runs / four["point"] / "checkpoints" / "last.ckpt").read_bytes())
        (runs / other["point"] / "metrics.json").unlink()
        error = run(*options, f"quant={name}", "bits=w3a3")["error"]
        for part in (str(last), "the recipe differs from the checkpoint's", "conv2.", "force=true to start again"):
            assert part in error, error


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_by_name(run, digits_weights, tmp_path, bad):
    from safetensors.torch import load_file, save_file

    state = load_file(digits_weights)
    state["conv2.weight"][0, 0, 0, 0] = float(bad)
    save_file(state, tmp_path / "bad.safetensors")
    error = run("study=s", f"weights={tmp_path / 'bad.safetensors'}")["error"]
    assert "conv2.weight holds 1 of 576 values that are not finite" in error, error


def test_values_that_are_not_finite_name_layer_and_batch(run, digits_weights, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(digits_weights)
    state["conv2.weight"][:] = 3e38  # finite, and their sums are not
    save_file(state, tmp_path / "bad.safetensors")
    error = run("study=s", f"weights={tmp_path / 'bad.safetensors'}")["error"]
    for part in ("conv2 (output), calibration batch 0", "values are NaN or infinite", "check the weights"):
        assert part in error, error


QUIET = ("trainer=cpu", "trainer.enable_progress_bar=false", "kernels=reference", "model=resnet20")


def test_a_data_folder_that_is_missing(compose, tmp_path):
    folder = tmp_path / "nowhere"
    metrics = pipeline.run(
        read(compose(*QUIET, "dataset=cifar10", f"dataset.data.root={folder}", f"runs_dir={tmp_path}"))
    )
    assert metrics["status"] == "failed"
    for part in ("QexpError", "CIFAR10", str(folder), "download"):
        assert part in metrics["error"], metrics["error"]


def test_a_network_for_other_images(compose, tmp_path):
    metrics = pipeline.run(read(compose(*QUIET, "dataset=digits", f"runs_dir={tmp_path}")))
    assert metrics["status"] == "failed" and metrics["error"].startswith("QexpError: "), metrics["error"]


def test_missing_kernels_are_no_error(run, caplog):
    from qexp.callbacks import kernels

    kernels._said.clear()
    with caplog.at_level(logging.INFO):
        assert run("study=s", "kernels=auto")["status"] == "ok"
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("kernels: ")]
    assert len(lines) == 1 and "(" in lines[0]


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "run.py", f"runs_dir={tmp_path / 'runs'}", "study=s", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_point_and_ends_non_zero(tmp_path, digits):
    done = command(tmp_path, *digits, "layer_wbit=2,1,8", "-m")
    assert done.returncode != 0, done.stdout
    table = pd.read_csv(tmp_path / "runs" / "s" / "results.csv")
    assert dict(zip(table.layer_wbit, table.status)) == {1: "failed", 2: "ok", 8: "ok"}
    assert "no positive level" in table.set_index("layer_wbit").error[1]
    assert "1 point failed" in done.stdout + done.stderr and (tmp_path / "runs" / "s" / "dashboard.html").exists()
    again = command(tmp_path, *digits, "layer_wbit=2,8", "-m")
    assert again.returncode == 0 and again.stdout.count("finished earlier") == 2, again.stdout


@pytest.mark.slow
def test_a_single_mistake_ends_non_zero_without_a_traceback(tmp_path, digits):
    done = command(tmp_path, *digits, "layer_abit=[32,8]")
    assert done.returncode != 0 and "layer_abit has 2 entries" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
