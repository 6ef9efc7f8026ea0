"""A finished point is found without torch, and only while nothing has changed that its name depends on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from qexp.command.compose import settings_of
from qexp.data.cifar import CIFAR10, CIFAR100
from qexp.data.digits import Digits
from qexp.report.study import finish
from qexp.run import earlier, pipeline
from qexp.run.settings import Settings, read

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("torch", "torchvision", "pytorch_lightning", "lightning", "torchmetrics", "sklearn", "scipy", "bokeh", "optuna"),
    *("tqdm", "onnx", "onnxruntime", "openvino", "timm", "qexp_kernels", "PIL"),
}


@pytest.fixture
def settings(compose: Callable, digits: list[str], tmp_path: Path) -> Callable[..., Settings]:
    """Call with overrides; returns the settings of a point under `tmp_path / "runs"`."""
    return lambda *words: read(compose(*digits, f"runs_dir={tmp_path / 'runs'}", "verify=0", *words))


def in_a_process_of_its_own(words: list[str]) -> subprocess.CompletedProcess:
    """Runs a command that ends by printing its status and the heavy libraries that it imported."""
    code = (
        "import sys; from qexp.command.program import main\n"
        f"status = main({words})\n"
        f"print(status, sorted({HEAVY} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)


def test_a_finished_point_is_answered_without_heavy_libraries(tmp_path, digits):
    words = [*digits, "quant=mse", "bits=w4a4", "study=s", f"runs_dir={tmp_path / 'runs'}"]
    metrics = pipeline.run(settings_of(words))
    finish(tmp_path / "runs" / "s")
    done = in_a_process_of_its_own(words)
    assert "finished earlier" in done.stdout and done.stdout.splitlines()[-1] == "0 []", done
    assert f"> mse       W4A4    {metrics['value']:.2f}" in done.stdout


def test_a_sweep_of_finished_points_is_answered_without_heavy_libraries(tmp_path, digits):
    shared = [*digits, "bits=w4a4", "study=s", f"runs_dir={tmp_path / 'runs'}"]
    for quant in ("mse", "minmax"):
        pipeline.run(settings_of([*shared, f"quant={quant}"]))
    finish(tmp_path / "runs" / "s")
    done = in_a_process_of_its_own(["-m", *shared, "quant=mse,minmax"])
    assert done.stdout.count("finished earlier") == 2 and done.stdout.splitlines()[-1] == "0 []", done
    done = in_a_process_of_its_own(["-m", *shared, "quant=mse,minmax", "ends_bit=8,4", "kernels=reference"])
    assert done.stdout.count("finished earlier") == 2 and "torch" in done.stdout.splitlines()[-1], done


def test_the_answer_is_the_record(settings):
    asked = settings("quant=mse", "bits=w4a4")
    assert earlier.finished(asked) is None
    metrics = pipeline.run(asked)
    found = earlier.finished(asked)
    assert found is not None and found["point"] == metrics["point"] and found["value"] == metrics["value"]
    assert earlier.finished(settings("quant=mse", "bits=w4a4", "kernels=auto", "callbacks.history=null")) is None
    assert earlier.finished(settings("quant=mse", "bits=w4a8")) is None


def test_a_finished_point_repeats_its_verdict(settings, caplog):
    asked = settings("deploy=integer", "verify=16")
    caplog.set_level("INFO")
    pipeline.run(asked)
    (verdict,) = [line for line in caplog.messages if line.startswith("integers against simulation")]
    caplog.clear()
    assert earlier.finished(asked) is not None
    _, said = caplog.messages
    assert re.sub(r" of \d+ codes", " codes", verdict) == said and "16 images: EQUAL (0 codes differ" in said
    for words, repeated in ((["verify=16", "force=false"], True), ([], False)):
        caplog.clear()
        pipeline.run(settings("deploy=integer", *words))
        assert "finished earlier" in caplog.text and (said in caplog.messages) == repeated


@pytest.mark.parametrize("words", [["force=true"], ["verify=16"], ["study=../out"], ["export=verify"], ["seed=1"]])
def test_another_request_is_left_to_the_run(words, settings):
    pipeline.run(settings())
    assert earlier.finished(settings()) is not None
    assert earlier.finished(settings(*words)) is None


def test_other_weights_in_the_same_file_are_noticed(settings, digits_weights, tmp_path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(digits_weights.read_bytes())
    asked = settings(f"weights={weights}")
    pipeline.run(asked)
    assert earlier.finished(asked) is not None
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    assert earlier.finished(asked) is None


def test_edited_code_of_the_user_is_noticed(settings, tmp_path, monkeypatch):
    rule = "class Whole:\n    needs_histogram = False\n    def __call__(self, s, g, c):\n        return {low}, s.max\n"
    (tmp_path / "own_rule_of_a_test.py").write_text(rule.format(low="s.min"))
    monkeypatch.syspath_prepend(tmp_path)
    asked = settings("quant.input.range._target_=own_rule_of_a_test.Whole")
    assert pipeline.run(asked)["status"] == "ok"
    assert earlier.finished(asked) is not None
    del sys.modules["own_rule_of_a_test"]  # as in a new process
    (tmp_path / "own_rule_of_a_test.py").write_text(rule.format(low="s.min / 2"))
    assert earlier.finished(asked) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', '{"files": ["x"], "stamp": "y"}'])
def test_a_damaged_memory_is_left_to_the_run(content, settings):
    asked = settings()
    pipeline.run(asked)
    (kept,) = (asked.shared / "seen").iterdir()
    kept.write_text(content)
    assert earlier.finished(asked) is None
    assert pipeline.run(asked)["status"] == "ok"
    assert earlier.finished(asked) is not None, "the run keeps it anew"


def test_what_was_not_used_for_longest_is_forgotten(settings, monkeypatch):
    asked = [settings(f"n_calibrate={n}") for n in (32, 33, 34, 35, 36)]
    for each in asked[:4]:
        earlier.keep(each, "images", [])
    folder = asked[0].shared / "seen"
    for age, each in enumerate(asked[:4]):
        os.utime(earlier._path(each), (age, age))
    monkeypatch.setattr(earlier, "MOST", 4)
    earlier.keep(asked[4], "images", [])
    assert sorted(folder.iterdir()) == sorted(earlier._path(each) for each in asked[2:])


def test_a_found_point_is_one_that_was_used(settings):
    pipeline.run(settings())
    (kept,) = (settings().shared / "seen").iterdir()
    os.utime(kept, (1, 1))
    assert earlier.found(settings()) is not None
    assert kept.stat().st_mtime > 1


def cifar(folder: Path, seed: int) -> None:
    """Writes a small data set in the form of CIFAR-10."""
    draw = np.random.default_rng(seed)
    arrays = {
        f"{split}_{what}": draw.integers(0, 256, (40, 32, 32, 3), np.uint8) if what == "images" else np.arange(40) % 10
        for split in ("train", "test")
        for what in ("images", "labels")
    }
    np.savez(folder / "cifar10.npz", **arrays)


def test_other_images_in_the_same_file_are_noticed(compose, tmp_path, monkeypatch):
    cifar(tmp_path, 0)
    words = ["dataset=cifar10", f"dataset.data.root={tmp_path}", "dataset.data.calibration_size=20", "n_calibrate=20"]
    words += ["model=toynet", "weights=random", "trainer=cpu", "kernels=reference", f"runs_dir={tmp_path / 'runs'}"]
    asked = read(compose(*words, "trainer.enable_progress_bar=false"))
    monkeypatch.setattr(earlier, "_STARTED", 0)
    assert pipeline.run(asked)["status"] == "ok"
    assert earlier.finished(asked) is None, "the images changed after the process started: it may have read others"
    monkeypatch.undo()
    monkeypatch.setattr(earlier, "_STARTED", 2**62)
    pipeline.run(asked)
    assert earlier.finished(asked) is not None
    cifar(tmp_path, 1)
    assert earlier.finished(asked) is None


@pytest.mark.parametrize("made", ["digits", "cifar10"])
def test_data_sets_read_only_the_files_that_they_name(made, tmp_path):
    cifar(tmp_path, 0)
    data = Digits() if made == "digits" else CIFAR10(tmp_path, calibration_size=8)
    opened: set[str] = set()
    listening = [True]
    sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" and listening else None)
    data.setup()
    listening.clear()
    sources = {str(path) for path in data.known_sources()}
    read_here = {name for name in opened if not name.endswith((".py", ".pyc")) and Path(name).is_file()}
    assert read_here & sources
    assert not {name for name in read_here - sources if Path(name).suffix in (".gz", ".npz", ".npy", ".csv")}


def test_a_subclass_that_does_not_name_its_files_is_not_remembered(tmp_path):
    class Own(Digits):
        pass

    assert Own().known_sources() is None
    assert CIFAR100(tmp_path).known_sources() == [tmp_path / "cifar100.npz", tmp_path / "cifar-100-python"]


def test_nothing_is_kept_where_the_folder_cannot_be_written(settings, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(earlier, "write_text", full)
    asked = settings()
    assert pipeline.run(asked)["status"] == "ok"
    assert earlier.finished(asked) is None
    assert json.loads(next((asked.runs_dir / asked.study).glob("*/metrics.json")).read_text())["status"] == "ok"
