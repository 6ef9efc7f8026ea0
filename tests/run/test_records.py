"""The origin in a study's rows, the requests that never become rows, and the messages of failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qexp.results.table_csv import collect
from qexp.run import export_finished, float_network, pipeline, training
from qexp.run.naming import weights_name
from qexp.run.settings import read
from qexp.system.whole_files import remove_leftovers

ROOT = Path(__file__).parents[2]


def study(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "s"


def test_a_row_names_its_weights_and_the_environment_their_hash_the_command_and_the_code(run, tmp_path, digits_weights):
    first = run("study=s")
    other = tmp_path / "other.safetensors"
    shutil.copy(digits_weights, other)
    assert first["weights"] == run("study=t", f"weights={other}")["weights"].replace("other", "digits")
    told = json.loads((study(tmp_path) / first["point"] / "environment.json").read_text())
    assert told["weights"]["sha256"].startswith(first["weights"].split("@")[1]) and told["weights"]["source"] == str(
        digits_weights
    )
    assert told["command"] and "qexp.models.digits_cnn" in told["code"]
    assert {"torch", "qexp"} <= set(told["packages"])


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (["weights=ResNet18_Weights.IMAGENET1K_V1"], "ResNet18_Weights.IMAGENET1K_V1"),
        (["weights='https://a.b/c/net.pth#sha256=0123456789abcdef'"], "net.pth@012345"),
        (["weights=null", "schedule.pretrain.epochs=7"], "trained 7 epochs"),
        (["weights=null", "schedule=float", "schedule.epochs=3"], "trained 3 epochs"),
        (["weights=null", "schedule=qat_scratch", "quant=lsq"], "random"),
        (["weights=nowhere/missing.pt"], "missing.pt"),
    ],
)
def test_weights_have_a_short_name(compose, digits, asked, name):
    assert weights_name(read(compose(*digits, *asked))) == name


def test_weights_trained_with_quantizers_are_called_that_where_they_are_the_reference(run, tmp_path, caplog):
    short = ("quant=lsq", "schedule=qat", "schedule.epochs=1", "bits=w4a4")
    trained = run("study=s", *short)
    with caplog.at_level("INFO"):
        again = run("study=s", f"weights={study(tmp_path) / trained['point']}")
    assert trained["reference"] == "" and again["reference"] == "qat weights in float"
    assert "qat weights in float" in caplog.text.splitlines()[-1] and again["weights"].startswith(
        f"{trained['point']}@"
    )


def test_a_proof_is_added_to_its_point(run, tmp_path):
    first = run("study=s", "quant=mse", "bits=w4a4")
    proven = run("study=s", "quant=mse", "bits=w4a4", "verify=16")
    assert proven["point"] == first["point"] and proven["verify_images"] == 16 and proven["value"] == first["value"]
    assert len(collect(study(tmp_path))) == 1
    before = (study(tmp_path) / first["point"] / "metrics.json").stat().st_mtime_ns
    for fewer in ("verify=8", "verify=16", "verify=0"):
        assert run("study=s", "quant=mse", "bits=w4a4", fewer)["verify_images"] == 16
    assert (study(tmp_path) / first["point"] / "metrics.json").stat().st_mtime_ns == before
    wider = run("study=s", "quant=mse", "bits=w4a4", "verify=16", "accumulator=16")
    assert wider["point"] == first["point"] and any(key.startswith("16") for key in wider["accumulator"])


def test_a_proof_that_fails_leaves_the_record_and_is_told(run, tmp_path, monkeypatch, caplog):
    first = run("study=s", "quant=mse")
    kept = (study(tmp_path) / first["point"] / "metrics.json").read_text()

    def broken(*_):
        raise ZeroDivisionError("a bug of the lowering")

    monkeypatch.setattr(pipeline.integer_proof, "lowered", broken)
    failed = run("study=s", "quant=mse", "verify=16")
    assert failed["status"] == "failed" and "ZeroDivisionError: a bug of the lowering" in failed["error"]
    assert "verify=16 failed: a bug of the lowering" in caplog.text and "Traceback" in caplog.text
    assert (study(tmp_path) / first["point"] / "metrics.json").read_text() == kept


def test_whatever_an_export_fails_with_is_told(run, tmp_path, monkeypatch, caplog):
    first = run("study=s", "quant=mse")

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(export_finished, "load_data", broken)
    failed = run("export=package", f"weights={study(tmp_path) / first['point']}")
    assert (
        failed == {"status": "failed", "error": "MemoryError: "} and "export=package failed: MemoryError" in caplog.text
    )


@pytest.mark.parametrize(
    "mistake",
    [
        "layer_wbit=[4,4]",
        "layer_wbit={nolayer*: 4}",
        "quant.weight.granularity=chanel",
        "plan=nowhere.csv",
    ],
)
def test_a_mistake_is_found_before_a_float_network_is_trained(run, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained"))
    failed = run("study=s", "weights=null", mistake)
    assert failed["status"] == "failed" and failed["mistake"] and failed["error"].startswith("QexpError: ")


def test_what_fails_later_is_no_mistake(run, monkeypatch):
    def broken(*_, **__):
        raise pipeline.QexpError("layer1: scale is not finite")

    monkeypatch.setattr(training, "evaluate", broken)
    monkeypatch.setattr(float_network, "reference", lambda *_: None)
    assert "mistake" not in run("study=s")


def command(tmp_path: Path, *words: str) -> tuple[int, str]:
    quiet = (
        "study=s",
        f"runs_dir={tmp_path / 'runs'}",
        "trainer.enable_progress_bar=false",
        "max_samples=100",
        "n_calibrate=32",
    )
    done = subprocess.run(
        [sys.executable, "run.py", *words, *quiet, "kernels=reference", "trainer=cpu"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_command_leaves_no_row_of_a_mistake_and_prints_the_table_of_its_own_study(tmp_path, digits_weights):
    net = (f"weights={digits_weights}", "model.net.width=8")
    status, said = command(tmp_path, *net, "layer_wbit=40")
    assert status == 1 and "layer_wbit: got 40" in said and not list(study(tmp_path).glob("*/metrics.json"))
    status, said = command(tmp_path, *net)
    assert status == 0
    (point,) = study(tmp_path).glob("*/metrics.json")
    done = subprocess.run(
        [sys.executable, "run.py", "export=verify", f"weights={point.parent}", "verify=8", f"runs_dir={tmp_path / 'elsewhere'}"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and said.count("table  ") == 1 and str(study(tmp_path) / "results.csv") in said


@pytest.mark.parametrize("name", ["..", "/elsewhere", "a/../../b", "a\nb", "a\x1bb", "", "x" * 256, ".cache"])
def test_a_study_is_a_folder_inside_runs_dir(compose, digits, tmp_path, name):
    asked = replace(read(compose(*digits, f"runs_dir={tmp_path / 'runs'}")), study=name)
    assert "study=" in pipeline.run(asked)["error"]
    assert not (tmp_path / "runs").exists() and not list(tmp_path.iterdir())


def test_what_dead_processes_were_writing_goes_and_what_live_ones_write_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, young = tmp_path / "a" / f"x.{dead.pid}.part", tmp_path / f"y.{dead.pid}.part"
    mine, kept = tmp_path / f"z.{os.getpid()}.part", tmp_path / "weights.safetensors"
    old.parent.mkdir()
    for path in (old, young, mine, kept):
        path.write_text("x")
        if path != young:
            os.utime(path, (1e9, 1e9))
    remove_leftovers(tmp_path)
    assert not old.exists() and young.exists() and mine.exists() and kept.exists()


def test_runs_of_different_weights_are_apart_in_the_table(run, tmp_path, digits_weights):
    from safetensors.torch import load_file, save_file

    from qexp.results.closing_table import closing_table

    worse = tmp_path / "worse.safetensors"
    weights = load_file(digits_weights)
    save_file(weights | {"fc.weight": weights["fc.weight"] + 0.3 * weights["fc.weight"].roll(1, 0)}, worse)
    one, two = run("study=s"), run("study=s", f"weights={worse}")
    assert one["value_float"] != two["value_float"]
    text = closing_table(collect(study(tmp_path)))
    lines = [line for line in text.splitlines() if line.startswith(("float", "minmax"))]
    assert len(lines) == 4 and all(
        sum(name in line for line in lines) == 2 for name in (one["weights"], two["weights"])
    )
