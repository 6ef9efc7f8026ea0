"""The table of long trainings: finished runs with their score, unfinished ones with the epoch they have reached."""

import json

import pandas as pd
from omegaconf import OmegaConf

from experiments.records.__main__ import GOALS, curve, row


def run(folder, epochs: int, reached: int, metrics: dict | None):
    folder.mkdir(parents=True)
    config = {"model": {"name": "resnet20"}, "quant": {"name": "lsq"}, "layer_wbit": 2, "layer_abit": 2}
    OmegaConf.save(OmegaConf.create({**config, "schedule": {"epochs": epochs}}), folder / "config.yaml")
    lines = [f"{10 * e},{e},{name},{value + e / 100}" for e in range(reached) for name, value in NAMED.items()]
    (folder / "curves.csv").write_text("step,epoch,name,value\n" + "\n".join(lines) + "\n")
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


NAMED = {"train_loss": 1.0, "val_top1": 0.8, "train_top1": 0.7}
DONE = {"status": "ok", "value": 89.0, "ci_low": 88.4, "ci_high": 89.6, "value_float": 91.7, "seconds_train": 7200}


def test_a_finished_run_shows_its_score_and_its_quarters(tmp_path):
    cells = row(run(tmp_path / "a", 8, 8, DONE), pd.read_csv(GOALS)).strip("| ").split(" | ")
    assert cells[:5] == ["resnet20 lsq W2A2", "8", "81.0, 83.0, 85.0, 87.0", "89.00 ± 0.60", "91.70"]
    assert cells[5] == "91" and cells[-1] == "2.0"


def test_an_unfinished_run_shows_how_far_it_is(tmp_path):
    cells = row(run(tmp_path / "a", 8, 5, None), pd.read_csv(GOALS)).split(" | ")
    assert cells[1:4] == ["5 of 8", "81.0, 83.0, –, –", "not finished"]


def test_a_curve_is_in_percent_by_epoch(tmp_path):
    found = curve(run(tmp_path / "a", 8, 2, None))
    assert found.val.tolist() == [80.0, 81.0] and found.train.tolist() == [70.0, 71.0]
