"""Trackers get a point's settings, curves, results and files, and change nothing about the point."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import Logger

from qexp.errors import QexpError
from qexp.run.settings import read
from qexp.run.trackers import PARENTS, Trackers, parent_of

ROOT = Path(__file__).parents[2]


class Own(Logger):
    """A user's tracker, which draws random numbers for the names of its runs, as services do."""

    made: ClassVar[list[Own]] = []

    def __init__(self, label: str = "", parent: str | None = None, run_id: str = "7") -> None:
        super().__init__()
        self.drawn = random.random(), np.random.rand(), torch.rand(())
        self.label, self.parent, self.run_id = label, parent, run_id
        self.scalars: dict[str, list] = {}
        self.about: dict[str, Any] = {}
        self.files: list[str] = []
        self.status = ""
        Own.made.append(self)

    name, version = "own", ""

    @property
    def experiment(self) -> Own:
        return self

    def log_hyperparams(self, params: dict) -> None:
        self.about = dict(params)

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        random.random()
        for key, value in metrics.items():
            self.scalars.setdefault(key, []).append((step, value))

    def log_artifact(self, run_id: str, path: str) -> None:
        assert run_id == self.run_id
        self.files.append(Path(path).name)

    def finalize(self, status: str) -> None:
        self.status = status


class Gone(Own):
    """A tracker whose server is gone."""

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        raise ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    Own.made.clear()
    monkeypatch.delenv(PARENTS, raising=False)


OWN = f"+logger.own={{_target_: {__name__}.Own, label: '{{study}}/{{point}}', parent: '{{parent}}'}}"


def test_a_point_sends_settings_curves_results_and_files(run):
    found = run("quant=lsq", "bits=w4a4", "schedule.epochs=2", OWN, "study=mine")
    (tracker,) = Own.made
    assert tracker.label == f"mine/{found['point']}" and tracker.parent is None
    assert tracker.about["quant"] == "lsq" and tracker.about["layer_wbit"] == 4
    assert tracker.scalars["value"] == [(None, found["value"])] and tracker.scalars["drop"] == [(None, found["drop"])]
    steps = [step for step, _ in tracker.scalars["val_top1"]]
    assert len(steps) == 2 and steps[1] == 2 * steps[0] and len(tracker.scalars["train_loss"]) >= 2
    assert tracker.files == ["layers.csv", "metrics.json", "config.yaml"] and tracker.status == "success"


def test_a_tracker_changes_neither_results_nor_names(run):
    plain = run(
        "quant=lsq", "bits=w3a3", "schedule.epochs=1", "weights=null", "schedule.pretrain.epochs=1", "study=plain"
    )
    tracked = run(
        "quant=lsq",
        "bits=w3a3",
        "schedule.epochs=1",
        "weights=null",
        "schedule.pretrain.epochs=1",
        "study=tracked",
        OWN,
        "logger=csv",
    )
    assert plain["point"] == tracked["point"]
    for key in ("value", "value_float", "worst_sqnr", "train_value"):
        assert plain[key] == tracked[key], key
    assert not any("val_top1" in t.scalars and len(t.scalars["val_top1"]) > 1 for t in Own.made), (
        "the float training is shared"
    )


def test_several_at_once_and_lightnings_own_csv(run, tmp_path):
    extra = [OWN, "logger=[csv,tensorboard]"] if find_spec("tensorboard") else [OWN, "logger=csv"]
    found = run("quant=lsq", "schedule.epochs=1", *extra)
    folder = tmp_path / "runs" / found["study"] / found["point"]
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows if row["value"]] == [found["value"]]
    assert any(row["val_loss"] for row in rows) and any(row["train_loss"] for row in rows)
    assert len(Own.made) == 1


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_sent(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run("quant=lsq", "schedule.epochs=1", "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "runs" / found["study"] / found["point"] / "tensorboard"))
    events.Reload()
    assert events.Scalars("value")[0].value == pytest.approx(found["value"])
    assert {"train_loss", "val_top1", "drop"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(run, caplog):
    found = run("quant=minmax", OWN, f"+logger.gone={{_target_: {__name__}.Gone}}")
    assert found["status"] == "ok"
    assert (
        "logger.gone: log_metrics raises ConnectionError: no route to host; the run goes on without it" in caplog.text
    )
    assert next(t for t in Own.made if not isinstance(t, Gone)).scalars["value"] == [(None, found["value"])]


def test_a_failed_point_is_told(run):
    found = run("quant=minmax", OWN, "quant.weight.range._target_=tests.nowhere.Rule")
    assert found["status"] == "failed" and Own.made[0].status == "failed"


def test_random_numbers_are_not_drawn_from_the_runs():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    made = Trackers.made({"own": {"_target_": f"{__name__}.Own"}}, Path("x"), Path(os.devnull).parent, "s", "t")
    made.log({"value": 1.0, "nan": float("nan"), "none": None, "text": "t"})
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert Own.made[0].scalars == {"value": [(None, 1.0)]}


def test_a_sweep_is_the_parent_of_its_points(tmp_path):
    specs = {
        "own": {"_target_": f"{__name__}.Own", "parent": "{parent}", "run_id": "42"},
        "csv": {"_target_": f"{__name__}.Own"},
    }
    parent = parent_of(specs, tmp_path, "s")
    assert list(parent.loggers) == ["own"] and json.loads(os.environ[PARENTS]) == {"own": "42"}
    Trackers.made(specs, tmp_path / "s" / "p", tmp_path, "s", "t")
    assert [t.parent for t in Own.made] == [None, "42", None]
    (tmp_path / "results.csv").write_text("x")
    parent.finish({}, tmp_path, ("results.csv", "dashboard.html"))
    assert Own.made[0].files == ["results.csv"] and Own.made[0].status == "success"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+logger.own={_target_: tests.Own, label: '{fodler}'}"], None),
        (["logger=mlflow"], "logger=mlflow needs mlflow: pip install mlflow"),
        (["logger=wandb"], "logger=wandb needs wandb: pip install wandb"),
        (["+logger.own=5"], "logger.own=5 is not allowed"),
    ],
)
def test_what_cannot_be_tracked_is_said_before_anything_runs(compose, overrides, words):
    if words is None:
        with pytest.raises(QexpError, match=r"'fodler' is no place; use {folder}, "):
            Trackers.of(read(compose(*overrides)), Path("x"))
    elif find_spec(overrides[0].partition("=")[2]):
        pytest.skip("it is installed")
    else:
        with pytest.raises(QexpError, match=words):
            read(compose(*overrides))


def _sweep(folder: Path, *words: str) -> subprocess.CompletedProcess:
    quiet = ["debug=fast", "study=s", "trainer=cpu", "kernels=reference", "trainer.enable_progress_bar=false"]
    command = [sys.executable, str(ROOT / "run.py"), "-m", "quant=minmax,mse", *words, *quiet]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mlflow"), reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's calls of SQLAlchemy
def test_mlflow_has_a_run_for_each_point_below_the_sweeps(tmp_path):
    from mlflow.tracking import MlflowClient

    _sweep(tmp_path, "logger=mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    parent = next(r for r in runs if r.info.run_name == "sweep s")
    points = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(points) == 2 and all("value" in r.data.metrics for r in points)
    assert {r.data.params["quant"] for r in points} == {"minmax", "mse"}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")
def test_wandb_leaves_a_run_for_each_point(tmp_path):
    done = _sweep(tmp_path, "logger=wandb")
    assert "goes on without" not in done.stdout + done.stderr
    assert len(list((tmp_path / "runs" / "s").glob("*/wandb/offline-run-*/*.wandb"))) == 2
