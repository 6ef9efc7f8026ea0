"""Tasks that are no classification, from the command line to the page: shares of pixels, decibels, an error that is better downwards."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.report.dashboard import write_dashboard
from qexp.results.closing_table import closing_table
from qexp.results.judging import Judging
from qexp.results.measure import Measure
from qexp.results.table_csv import collect, write_results
from qexp.run import pipeline
from qexp.run.settings import read
from qexp.tasks.base import Score
from qexp.tasks.classification import Classification
from qexp.tasks.restoration import Restoration
from qexp.tasks.segmentation import Segmentation
from qexp.tasks.verification import Verification
from tests.squared_error import SquaredError

QUICK = [
    *("trainer=cpu", "kernels=reference", "trainer.enable_progress_bar=false", "max_samples=100", "n_calibrate=64"),
    *("model.net.width=8", "deploy=integer", "verify=32", "search=sensitivity", "search.images=64"),
]
QUICK += ["search.widths=[2,8]", "study=s"]
PTQ = [*QUICK, "quant=mse", "bits=w4a8", "schedule.pretrain.epochs=1"]
QAT = [*QUICK, "quant=lsq", "bits=w4a8", "schedule=qat", "schedule.epochs=1", "schedule.pretrain.epochs=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


def finished(compose, folder, *overrides):
    metrics = pipeline.run(read(compose(*overrides, f"runs_dir={folder}")))
    assert metrics["status"] == "ok", metrics["error"]
    return metrics, folder / metrics["study"] / metrics["point"]


@pytest.mark.parametrize("steps", [[*PTQ, "accumulator=[16]"], QAT], ids=["ptq", "qat"])
def test_a_segmentation_is_scored_in_percent_whoever_computed_it(compose, folder, steps):
    metrics, at = finished(compose, folder / "seg", "model=digits_segmenter", "dataset=digit_masks", *steps)
    assert (metrics["metric"], metrics["metric_label"], metrics["unit"]) == ("miou", "mIoU", "%")
    assert 30 < metrics["value"] < 100 and metrics["ci_low"] <= metrics["value"] <= metrics["ci_high"]
    assert metrics["interval"].startswith("bootstrap") and metrics["verify"] == "equal"
    assert metrics["verify_predictions_differ"] == 0 and 30 < metrics["value_integer"] < 100
    assert all(0 < value <= 100 for value in metrics.get("accumulator", {}).values())
    table = pd.read_csv(at / "sensitivity.csv")
    assert table.agree.between(0, 100).all() and table.value.between(0, 100).all() and (table.divergence >= 0).all()


@pytest.mark.parametrize("steps", [[*PTQ, "accumulator=[16,24]"], QAT], ids=["ptq", "qat"])
def test_decibels_stay_decibels_from_the_record_to_the_page(compose, folder, steps):
    metrics, at = finished(compose, folder / "den", "model=digits_denoiser", "dataset=noisy_digits", *steps)
    assert (metrics["unit"], metrics["is_share"], metrics["higher_is_better"]) == ("dB", False, True)
    assert 5 < metrics["value"] < 20 and metrics["ci_low"] < metrics["value"] < metrics["ci_high"]
    assert metrics["verify"] == "equal" and metrics["verify_predictions_differ"] is None
    assert abs(metrics["value_integer"] - metrics["value"]) < 2
    if "accumulator" in metrics:
        assert metrics["accumulator"]["24 wrap"] == pytest.approx(metrics["value_integer"])
    table = pd.read_csv(at / "sensitivity.csv")
    assert table.agree.isna().all(), "decibels decide nothing"
    assert (table.value.abs() < 30).all() and table.drop(columns="layer")["drop"].notna().all()
    csv = pd.read_csv(write_results(at.parent))
    assert set(csv.unit) == {"dB"} and (csv.value < 20).all()
    text = closing_table(collect(at.parent), correct={})
    assert "PSNR dB" in text and "%" not in text.replace("95 %", "")
    page = write_dashboard(at.parent).read_text()
    assert '"unit":"dB"' in page and '"is_share":false' in page


def test_an_error_is_better_downwards_everywhere(compose, folder):
    own = ["model=digits_denoiser", "dataset=noisy_digits", "dataset.task._target_=tests.squared_error.SquaredError"]
    metrics, at = finished(compose, folder / "mse", *own, *QAT)
    assert metrics["drop"] == pytest.approx(metrics["value"] - metrics["value_float"]), "a greater error is a loss"
    saved = torch.load(at / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    (best,) = (state for name, state in saved["callbacks"].items() if "val_mse" in name)
    assert (
        "'mode': 'min'" in next(name for name in saved["callbacks"] if "val_mse" in name)
        and best["best_model_score"] > 0
    )
    table = pd.read_csv(at / "sensitivity.csv")
    assert table[table.bits == 2]["drop"].max() > 0
    rows = collect(at.parent)
    worse = rows.assign(point="worse", quant="minmax", value=1.0, ci_low=0.9, ci_high=1.1, drop=0.9)
    text = closing_table(pd.concat([rows, worse], ignore_index=True), correct={})
    assert "best: lsq" in text and "every other is above it" in text


def test_a_score_that_is_no_share_cannot_pass_for_one():
    with pytest.raises(QexpError, match=r"metric miou: value=56.26 is not a share in 0..1"):
        Segmentation(nn.Identity(), 2).scored(56.26, 0.0, 1.0, "none", 3)
    with pytest.raises(QexpError, match=r"top5=90 is not a share"):
        Score("top1", 0.5, 0.4, 0.6, "Wilson", 3, {"top5": 90.0})
    assert Restoration(nn.Identity()).scored(21.3, 20.0, 22.0, "normal", 3).measure.text(21.3) == "21.30 dB"


def test_a_saved_score_keeps_its_unit(tmp_path):
    score = SquaredError(nn.Identity()).scored(1.5, 1.0, 2.0, "two standard errors", 3)
    score.save(tmp_path / "score.npz")
    assert Score.load(tmp_path / "score.npz").measure == score.measure
    assert not score.measure.is_share and not score.measure.higher_is_better


def test_outputs_are_judged_alike_in_one_go_and_batch_by_batch():
    torch.manual_seed(0)
    cases = [
        (Classification(nn.Identity(), 4), torch.randn(9, 4), torch.arange(9) % 4),
        (Segmentation(nn.Identity(), 3), torch.randn(9, 3, 4, 4), torch.randint(-1, 3, (9, 4, 4))),
        (Restoration(nn.Identity()), torch.rand(9, 1, 4, 4), torch.rand(9, 1, 4, 4)),
    ]
    for task, outputs, targets in cases:
        judging = Judging(task)
        for at in (slice(0, 4), slice(4, 9)):
            judging.add(outputs[at], targets[at])
        whole = task.judge(outputs, targets)
        assert judging.score.value == whole.value and judging.score.low == whole.low and whole.n == 9
    assert Judging(None).score is None and Judging(cases[0][0]).stored is None


def test_the_mean_intersection_counts_pixels_of_all_images_together():
    outputs = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[1.0, 1.0]], [[0.0, 0.0]]]])  # classes 0 1 | 0 0
    targets = torch.tensor([[[0, 1]], [[0, 1]]])
    score = Segmentation(nn.Identity(), 2).judge(outputs, targets)
    assert score.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert np.isnan(Segmentation(nn.Identity(), 2).score_of([]).value)


@pytest.mark.parametrize(
    ("row", "collapsed"),
    [
        ({"metric": "top1", "value": 40.0, "value_float": 90.0}, True),
        ({"metric": "error", "value": 60.0, "value_float": 10.0, "higher_is_better": False}, True),
        ({"metric": "error", "value": 30.0, "value_float": 10.0, "higher_is_better": False}, False),
        ({"metric": "psnr", "value": 12.0, "value_float": 22.0, "is_share": False, "unit": "dB"}, False),
        ({"metric": "mse", "value": 0.5, "value_float": 0.2, "is_share": False, "higher_is_better": False}, True),
        ({"metric": "psnr", "value": -9.0, "value_float": -3.0, "is_share": False}, False),
    ],
)
def test_what_counts_as_a_collapse_follows_the_metric(row, collapsed):
    row = json.loads(json.dumps(row))
    assert Measure.of(row).has_collapsed(row["value"], row["value_float"]) is collapsed


def test_a_search_goes_the_way_the_metric_points(compose, folder):
    pytest.importorskip("optuna")
    own = ["model=digits_denoiser", "dataset=noisy_digits", "dataset.task._target_=tests.squared_error.SquaredError"]
    own += [one for one in PTQ if one not in ("deploy=integer", "search=sensitivity", "verify=32")] + ["search=pareto"]
    options = ["search.goal=value", "search.trials=6", "search.score_images=64"]
    metrics, at = finished(compose, folder / "front", *own, *options)
    trials = pd.read_csv(at / "pareto.csv")
    least = trials.sort_values(["value", "weight_bytes", "bops"]).iloc[0]
    assert least.front and metrics["search_trials"] == 6, "the plan with the least error is beaten by none"
    refused = pipeline.run(read(compose(*own, "search.goal=agree", f"runs_dir={folder}")))
    assert "SquaredError decides nothing per image; use divergence" in refused["error"]


def test_a_task_that_cannot_judge_outputs_alone_says_none():
    judging = Judging(Verification(nn.Identity()))
    judging.add(torch.randn(4, 8), torch.arange(4))
    assert judging.score is None and judging.stored is None
    assert Verification(nn.Identity()).judge(torch.randn(4, 8), torch.arange(4)) is None
