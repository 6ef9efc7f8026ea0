"""Targets are whole, sourced and reachable; a table shows what was reproduced, what was not, and what has not been run."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.published import float_scores, line, matching, read_targets, table

ROOT = Path(__file__).parents[2]
TARGETS = sorted(ROOT.glob("experiments/*/targets.csv"))
STUDIES = sorted(p.stem for p in ROOT.glob("conf/experiment/*.yaml"))


@pytest.mark.parametrize("path", TARGETS, ids=lambda p: p.parent.name)
def test_every_target_is_sourced_and_its_parts_exist(path):
    targets = read_targets(path)
    assert len(targets) and (targets.tolerance > 0).all()
    for name, group in (("model", "model"), ("quant", "quant")):
        known = {
            text.split("name:")[1].split()[0]
            for f in (ROOT / "conf" / group).rglob("*.yaml")
            if "name:" in (text := f.read_text())
        }
        known |= {f.stem for f in (ROOT / "conf" / group).rglob("*.yaml")}
        assert set(targets[name]) <= known, set(targets[name]) - known
    assert all((ROOT / "conf" / "dataset" / f"{d}.yaml").exists() for t in targets.dataset for d in t.split("|"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_point_of_a_study_composes(compose, name):
    path = ROOT / "conf" / "experiment" / f"{name}.yaml"
    assert path.read_text().splitlines()[1].startswith("# ")  # what it is, and where its target comes from
    body = yaml.safe_load(path.read_text())
    parser = OverridesParser.create()
    params = body.get("hydra", {}).get("sweeper", {}).get("params", {})
    choices = [
        [f"{key}={value}" for value in parser.parse_override(f"{key}={values}").sweep_string_iterator()]
        if parser.parse_override(f"{key}={values}").is_sweep_override()
        else [f"{key}={values}"]
        for key, values in params.items()
    ]
    points = list(itertools.product(*choices))
    for point in {points[0], points[-1]} | {p for p in points if p[1:] == points[0][1:]}:
        cfg = compose(f"experiment={name}", *point)
        assert cfg.study


@pytest.fixture
def target() -> pd.Series:
    values = {
        "model": "net",
        "dataset": "imagenet|imagenet_sample",
        "quant": "mse",
        "wbit": "4",
        "abit": "8",
        "float": 70.0,
    }
    return pd.Series({**values, "value": 68.0, "tolerance": 0.5, "source": "A paper", "needs": "ImageNet"})


def points(*drops: float, dataset: str = "imagenet") -> pd.DataFrame:
    rows = [
        {"status": "ok", "model": "net", "dataset": dataset, "quant": "mse", "layer_wbit": 4, "layer_abit": 8, "seed": seed,
         "value_float": 71.0, "value": 71.0 - drop, "drop": drop, "ci_low": 70.8 - drop, "ci_high": 71.2 - drop}
        for seed, drop in enumerate(drops)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("drop", "verdict"), [(2.0, "reproduced"), (2.6, "reproduced"), (3.0, "worse"), (1.0, "better")]
)
def test_the_loss_against_float_is_what_is_compared(target, drop, verdict):
    assert f"| {verdict} (±0.5) |" in line(target, matching(points(drop), target))


def test_other_images_and_several_seeds_are_said(target):
    text = line(target, matching(points(1.9, 2.1, dataset="imagenet_sample"), target))
    assert "on imagenet_sample" in text and "sd 0.14 of 2 seeds" in text


def test_the_best_of_several_settings_is_named(target, tmp_path):
    several = points(5.0, 2.0, 3.0).assign(folder=[tmp_path / str(i) for i in range(3)])
    for folder, (tau, seed) in zip(several.folder, [(0.1, 0), (0.0, 0), (0.0, 1)]):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"quant: {{tau: {tau}}}\nlayer_wbit: 4\nlayer_abit: 8\nseed: {seed}\n")
    text = line(target, several)
    assert "(+2.50), sd 0.71 of 2 seeds on imagenet (tau=0.0) |" in text


def test_a_network_trained_from_random_weights_is_held_against_one_trained_in_float(target):
    scratch = points(2.0).assign(value_float=float("nan"), drop=float("nan"), schedule="qat_scratch")
    assert "no float network beside it" in line(target, matching(float_scores(scratch), target))
    trained = points(0.0).assign(schedule="float", quant="none", value=70.5)
    both = float_scores(pd.concat([scratch, trained], ignore_index=True))
    assert "70.50 → 69.00" in line(target, matching(both, target)) and "(+1.50)" in line(target, matching(both, target))


def test_a_row_that_was_not_run_says_what_it_needs(target):
    text = table(pd.DataFrame([target]), points(2.0).assign(quant="kl"))
    assert "not run: needs ImageNet" in text and "0 of 1 rows run" in text
    assert len({row.count("|") for row in text.splitlines() if row.startswith("|")}) == 1, "as many cells as columns"


def test_targets_without_a_source_are_refused(target, tmp_path):
    pd.DataFrame([target.to_dict() | {"source": ""}]).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match="names its source"):
        read_targets(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("model\nnet\n")
    with pytest.raises(ValueError, match="columns abit"):
        read_targets(tmp_path / "t.csv")
