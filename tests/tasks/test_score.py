"""A score is saved and loaded unchanged, and the table uses the recorded interval for every metric."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from qexp.results.closing_table import closing_table
from qexp.tasks.base import Score
from qexp.tasks.classification import Classification


def test_a_saved_score_comes_back_whole(tmp_path):
    outcomes = {"boxes": np.arange(8, dtype=np.float32).reshape(2, 4), "score": np.array([0.9, 0.1])}
    score = Score("map_voc07", 0.1 + 0.2, 0.25, 1 / 3, "bootstrap", 2, {"map_area": 0.5}, outcomes)
    score.save(tmp_path / "kept" / "one.npz")
    back = Score.load(tmp_path / "kept" / "one.npz")
    assert {k: v for k, v in vars(back).items() if k != "outcomes"} == {
        k: v for k, v in vars(score).items() if k != "outcomes"
    }
    assert back.outcomes.keys() == outcomes.keys() and (back.outcomes["boxes"] == outcomes["boxes"]).all()
    assert not list(tmp_path.rglob("*.part*"))


def test_classification_counts_samples_and_says_wilson():
    task = Classification(torch.nn.Identity(), 6)
    task.log = lambda *_, **__: None
    task.on_test_start()
    logits = torch.eye(6)
    task.test_step((logits[:4], torch.tensor([0, 1, 2, 0])), 0)
    task.test_step((logits[4:5], torch.tensor([4])), 1)
    score = task.score()
    assert (score.metric, score.n, score.value, score.interval) == ("top1", 5, 0.8, "Wilson")
    assert score.outcomes["correct"].tolist() == [True, True, True, False, True]
    assert score.low < 0.8 < score.high and score.others["top5"] == 1.0
    assert task.monitor == "val_top1"


def test_no_sample_is_no_number():
    task = Classification(torch.nn.Identity(), 3)
    assert math.isnan(task.score().value) and task.score().n == 0


@pytest.mark.parametrize(("recorded", "shown"), [((61.0, 69.5), "61.00 - 69.50"), ((math.nan, math.nan), "-")])
def test_the_float_line_of_a_map_takes_the_recorded_interval(recorded, shown):
    row = {
        "study": "s",
        "point": "p",
        "status": "ok",
        "error": "",
        "model": "m",
        "dataset": "voc",
        "metric": "map_voc07",
    }
    row |= {"quant": "mse", "schedule": "ptq", "layer_wbit": 8, "layer_abit": 8, "mean_wbit": 8.0, "mean_abit": 8.0}
    row |= {"value": 64.0, "value_float": 65.0, "drop": 1.0, "ci_low": 60.0, "ci_high": 68.0, "n_eval": 100, "seed": 0}
    row |= {"seconds_calibrate": 1.0, "seconds_train": 0.0, "seconds_evaluate": 1.0}
    row |= {"ci_low_float": recorded[0], "ci_high_float": recorded[1]}
    lines = closing_table(pd.DataFrame([row])).splitlines()
    assert "mAP %" in lines[1]
    assert lines[3].split()[:3] == ["float", "W32A32", "65.00"] and shown in lines[3]
