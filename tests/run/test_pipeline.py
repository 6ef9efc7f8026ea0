"""A whole run on real digits: what it returns, what it writes, what it does the second time."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from qexp.results import wording
from qexp.results.table_csv import COLUMNS, collect, write_results
from qexp.run import pipeline
from qexp.run.settings import read

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "columns.json").read_text())


def folder(tmp_path: Path, metrics: dict) -> Path:
    return tmp_path / "runs" / metrics["study"] / metrics["point"]


def test_ptq_writes_the_run_folder(run, tmp_path):
    metrics = run("study=s", "bits=w8a8")
    assert metrics["status"] == "ok" and metrics["error"] == ""
    assert metrics["n_eval"] == 200 and metrics["n_calibrate"] == 64
    assert metrics["value_float"] > 60 and abs(metrics["drop"]) <= 2
    assert metrics["drop"] == pytest.approx(metrics["value_float"] - metrics["value"])
    assert metrics["ci_low"] < metrics["value"] < metrics["ci_high"]
    assert (
        metrics["mean_wbit"] == metrics["mean_abit"] == 8
        and metrics["weight_bytes_float"] == 4 * metrics["weight_bytes"]
    )
    assert metrics["bops"] == 64 * metrics["macs"] and metrics["kernels"] == "reference"
    here = folder(tmp_path, metrics)
    for name in (
        "metrics.json",
        "layers.csv",
        "config.yaml",
        "environment.json",
        "log.txt",
        "histograms.json",
        "correct.npy",
    ):
        assert (here / name).stat().st_size > 0, name
    assert not list(here.glob("*.part")) and not list(here.glob(".*part"))
    kept = json.loads((here / "metrics.json").read_text())
    assert kept["value"] == metrics["value"] and kept["status"] == "ok"
    config = OmegaConf.load(here / "config.yaml")
    assert config.layer_wbit == 8 and config.quant.name == "minmax" and config.seed == 0
    recorded = json.loads((here / "environment.json").read_text())["packages"]["torch"]
    assert torch.__version__.startswith(recorded) and recorded


def test_layers_csv_says_what_each_tensor_carries(run, tmp_path):
    metrics = run("study=s", "bits=w4a4")
    table = pd.read_csv(folder(tmp_path, metrics) / "layers.csv")
    assert list(table.columns)[: len(GOLDEN["layers.csv"])] == GOLDEN["layers.csv"]
    assert list(table.layer.unique()) == ["conv1", "conv2", "conv3", "conv4", "fc"]
    rows = table.set_index(["layer", "site"])
    assert rows.loc[("conv1", "weight"), "bits"] == 8 and rows.loc[("conv2", "weight"), "bits"] == 4
    assert rows.loc[("conv1", "weight"), "rule"] == "quant.rules.ends"
    assert rows.loc[("conv2", "weight"), "levels"] == 15 and rows.loc[("conv2", "input"), "levels"] == 16
    assert (table.levels_used <= table.levels * 8).all() and (table.sqnr > 0).all()
    weights = table[table.site == "weight"]
    assert weights.macs.sum() == metrics["macs"] and weights.bops.sum() == metrics["bops"]


def test_results_csv_has_the_documented_columns(run, tmp_path):
    run("study=s", "bits=w8a8")
    run("study=s", "bits=w4a4")
    write_results(tmp_path / "runs" / "s")
    table = pd.read_csv(tmp_path / "runs" / "s" / "results.csv")
    documented = GOLDEN["results.csv"]
    assert set(documented) <= set(table.columns) and list(COLUMNS)[: len(documented)] == documented
    assert sorted(table.layer_wbit.astype(int)) == [4, 8]
    assert table[["params", "macs", "value_float"]].nunique().eq(1).all()
    filled = [c for c in documented if c not in ("error", "commit")]
    assert table[filled].notna().all().all()


def test_a_finished_point_is_not_run_again(run, tmp_path, monkeypatch):
    first = run("study=s")
    before = (folder(tmp_path, first) / "metrics.json").stat().st_mtime_ns

    def never(*_):
        raise AssertionError("ran again")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "experiment", never)
        assert run("study=s")["value"] == first["value"]
        assert run("study=s", "kernels=auto", "trainer.devices=1")["point"] == first["point"], (
            "where it runs changes no result"
        )
    assert (folder(tmp_path, first) / "metrics.json").stat().st_mtime_ns == before
    again = run("study=s", "force=true")
    assert again["value"] == first["value"] and (folder(tmp_path, first) / "metrics.json").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "change", ["seed=1", "layer_wbit=7", "quant=mse", "n_calibrate=32", "max_samples=100", "ends_bit=7", "bn=keep"]
)
def test_what_changes_a_result_changes_the_point(compose, digits, change):
    from qexp.run.naming import point_hash

    assert point_hash(read(compose(*digits)), {}) != point_hash(read(compose(*digits, change)), {})
    assert point_hash(read(compose(*digits)), {}) != point_hash(read(compose(*digits)), {"weights": "other"})


def test_processes_that_train_make_another_point(compose, digits):
    """Each has a batch of its own: two train another network than one. Ranges and scores are those of one."""
    from qexp.run.naming import point_hash

    def same(*options: str) -> bool:
        one, two, chosen = (
            point_hash(read(compose(*digits, *options, f"trainer.devices={n}")), {}) for n in (1, 2, "auto")
        )
        assert chosen == one
        return one == two

    assert same("schedule=ptq") and same("schedule=float", "schedule.epochs=0")
    assert not same("schedule=qat", "quant=lsq") and not same("schedule=float")
    assert not same("schedule=ptq", "weights=null"), "the float network is trained first"


def test_networks_trained_by_other_processes_or_from_other_files_are_kept_apart(compose, digits, tmp_path):
    from qexp.run import float_network
    from qexp.run.datasets import load_data

    start = tmp_path / "start.safetensors"
    own = ("weights=null", "model.net.width=8", f"+model.net.backbone={start}")
    data = load_data(read(compose(*digits)).data.module)
    kept = set()
    for content, count in ((b"1", 1), (b"1", 2), (b"2", 1)):
        start.write_bytes(content)
        kept.add(float_network._float_hash(read(compose(*digits, *own, f"trainer.devices={count}")), data))
    assert len(kept) == 3


@pytest.mark.parametrize("key", ["schedule.distill.teacher.weights", "+model.net.backbone"])
def test_another_file_under_the_same_name_is_another_point(compose, digits, tmp_path, key):
    """As is the same file under another name the same point; a name that is no file is compared as text."""
    from qexp.run.contents import contents
    from qexp.run.naming import point_hash

    def point(file: str) -> str:
        teacher = ("schedule=qat", "quant=lsq", "model@schedule.distill.teacher=digits_cnn")
        cfg = read(compose(*digits, *teacher, f"{key}={file}"))
        return point_hash(cfg, contents(cfg))

    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    assert point(tmp_path / "a") == point(tmp_path / "c") != point(tmp_path / "b")
    assert point("IMAGENET1K_V1") != point("IMAGENET1K_V2")
    first = point(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"3")
    assert point(tmp_path / "a") != first


def test_another_plan_under_the_same_name_is_another_point(run, tmp_path):
    plan = tmp_path / "plan.csv"
    plan.write_text("layer,site,bits\nconv2,weight,4\n")
    first = run("study=s", f"plan={plan}")
    plan.write_text("layer,site,bits\nconv2,weight,2\n")
    second = run("study=s", f"plan={plan}")
    assert first["status"] == second["status"] == "ok" and first["point"] != second["point"]
    assert second["mean_wbit"] < first["mean_wbit"]
    assert {first["layer_wbit"], first["layer_abit"], second["layer_wbit"]} == {"plan"}
    assert first["plan"].startswith("plan.csv@") and first["plan"] != second["plan"]


def test_a_plan_names_the_point_wherever_it_is_told(run, tmp_path, caplog):
    (tmp_path / "x.csv").write_text("layer,site,bits\nconv2,weight,4\n")
    with caplog.at_level("INFO"):
        metrics = run("study=s", f"plan={tmp_path / 'x.csv'}")
    assert f"plan {metrics['plan']}: top-1" in caplog.text and "W8A8" not in caplog.text
    assert wording.width(metrics) == f"W~{metrics['mean_wbit']:.2g}A~8"
    gone = run("study=s", "plan=nowhere/layers.csv")
    assert gone["plan"] == "nowhere" and wording.width(gone) == "plan nowhere"
    planned = run("study=s", f"plan={tmp_path / 'x.csv'}", "schedule=float")
    assert planned["layer_wbit"] == 32 and "plan" not in planned


def test_layers_csv_is_a_plan(run, tmp_path):
    first = run("study=s", "layer_wbit=[8,4,2,8]", "layer_abit=[32,5,4,8]")
    assert first["status"] == "ok", first["error"]
    again = run("study=s", f"plan={folder(tmp_path, first) / 'layers.csv'}")
    assert again["status"] == "ok", again["error"]
    assert again["value"] == first["value"] and again["bops"] == first["bops"]


def test_all_float_gives_the_float_accuracy(run):
    for override in ("bits=float", "layer_wbit=32"):
        metrics = run("study=s", override)
        assert metrics["status"] == "ok", metrics["error"]
        if override == "bits=float":
            assert metrics["value"] == metrics["value_float"] and metrics["mean_wbit"] == 32


@pytest.mark.parametrize("quant", ["percentile", "mse", "kl", "aciq", "lsq", "pact", "dorefa", "mpact"])
def test_each_method_of_the_first_line_runs(run, quant):
    metrics = run("study=s", f"quant={quant}", "bits=w4a4")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["value"] > 15 and metrics["quant"] == quant


@pytest.mark.parametrize(
    "option", ["+quant.input.range.over=batches", "quant.input.range._target_=qexp.ranges.MovingAverage"]
)
def test_how_extremes_are_gathered_is_an_option_of_minmax(run, option):
    metrics = run("study=s", "quant=minmax", option, "bits=w4a4")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["value"] > 15 and metrics["point"] != run("study=s", "quant=minmax", "bits=w4a4")["point"]


def test_a_failed_point_is_recorded_and_can_be_run_again(run, tmp_path):
    failed = run("study=s", "layer_wbit=[4,4]")
    assert failed["status"] == "failed" and "layer_wbit has 2 entries" in failed["error"]
    assert failed["error"].startswith("QexpError: ") and failed["quant"] == "minmax"
    kept = json.loads((folder(tmp_path, failed) / "metrics.json").read_text())
    assert kept["status"] == "failed" and kept["error"] == failed["error"]
    assert run("study=s", "layer_wbit=8")["status"] == "ok", "the next point runs"
    assert {row["status"] for row in collect(tmp_path / "runs" / "s").to_dict("records")} == {"failed", "ok"}
    assert (
        "Traceback" in (folder(tmp_path, failed) / "log.txt").read_text()
        or (folder(tmp_path, failed) / "log.txt").exists()
    )


def test_a_bug_is_recorded_with_its_traceback(run, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(pipeline, "attach", broken)
    failed = run("study=s")
    assert failed["status"] == "failed" and failed["error"] == "ZeroDivisionError: a bug of ours"
    log = (folder(tmp_path, failed) / "log.txt").read_text()
    assert "Traceback" in log and "ZeroDivisionError" in log


def test_an_interrupt_is_no_failure(run, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "attach", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("study=s")
    assert not list((tmp_path / "runs" / "s").rglob("metrics.json"))


def test_a_second_method_calibrates_without_a_forward_pass(run, monkeypatch):
    from qexp.calibration import calibrate

    run("study=s")

    def never(*_, **__):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibrate, "collect", never)
    for quant in ("mse", "kl", "aciq", "percentile"):
        for bits in ("w8a8", "w2a4"):
            metrics = run("study=s", f"quant={quant}", f"bits={bits}")
            assert metrics["status"] == "ok", metrics["error"]


def test_runs_are_reproducible(run):
    values = {run(f"study={study}", "quant=mse", "bits=w3a3")["value"] for study in ("a", "b")}
    assert len(values) == 1


def test_the_float_network_is_trained_once_and_kept(run, tmp_path, monkeypatch):
    from qexp.run import training

    fits = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    options = ("weights=null", "schedule.pretrain.epochs=1", "model.net.width=4", "study=s")
    first, second = run(*options), run(*options, "bits=w4a4")
    assert first["status"] == second["status"] == "ok", first["error"]
    assert len(fits) == 1 and first["value_float"] == second["value_float"]
    assert list((tmp_path / "runs" / ".cache" / "float").rglob("weights.safetensors"))


def test_the_log_goes_on_where_a_point_is_run_again_and_begins_anew_where_it_is_forced(run, tmp_path, monkeypatch):
    def dying(*args, **options):
        raise RuntimeError("the machine went down")

    def said(*options: str) -> str:
        return (folder(tmp_path, run("study=s", *options)) / "log.txt").read_text()

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.training, "evaluate", dying)
        first = said()
    second = said()
    assert "the machine went down" in first and "run again" not in first
    assert second.startswith(first) and second.removeprefix(first).splitlines()[0].endswith(
        "run again; the lines of an earlier process are above"
    )
    assert "top-1" in second.removeprefix(first)
    forced = said("force=true")
    assert "top-1" in forced and "run again" not in forced and "the machine went down" not in forced
