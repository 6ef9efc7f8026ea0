"""The long trainings as one table, finished or not: `python -m experiments.records runs/records_* [--curves DIR]`.

One row per run: the test accuracy with half of its 95 % interval where the run has finished, else the epoch it has reached; the accuracy on
held-out training images after each quarter of the epochs; the goal, and what was published. With `--curves`, each run leaves its curve of
held-out and training accuracy by epoch in that folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

GOALS = Path(__file__).with_name("goals.csv")
HEAD = "| run | epochs | held out, after each quarter | test | float | goal | published | hours |"


def curve(run: Path) -> pd.DataFrame:
    """Returns a run's accuracy in percent by epoch: `val`, on held-out training images, and `train`."""
    kept = pd.read_csv(run / "curves.csv", names=["step", "epoch", "name", "value"], header=0)
    wanted = kept[kept.name.isin(["val_top1", "train_top1"])]
    by_epoch = wanted.pivot_table(index="epoch", columns="name", values="value", aggfunc="last")
    return (100 * by_epoch.rename(columns={"val_top1": "val", "train_top1": "train"})).round(2)


def row(run: Path, goals: pd.DataFrame) -> str:
    """Returns the line of one run."""
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))  # type: ignore[assignment]
    metrics = run / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.is_file() else {}
    model, bits = config["model"]["name"], f"W{config['layer_wbit']}A{config['layer_abit']}"
    epochs, val = config["schedule"]["epochs"], curve(run).val.dropna()
    done = found.get("status") == "ok"
    quarters = [val.get(round(epochs * k / 4) - 1) for k in range(1, 5)]
    test = f"{found['value']:.2f} ± {(found['ci_high'] - found['ci_low']) / 2:.2f}" if done else "not finished"
    known = goals[(goals.model == model) & (goals.bits == bits)]
    goal = published = ""
    if len(known):
        aim = known.iloc[0]
        goal, published = "" if pd.isna(aim.goal) else f"{aim.goal:g}", f"{aim.published:g} ({aim.source})"
    cells = [
        f"{model} {config['quant']['name']} {bits}",
        str(epochs) if done else f"{len(val)} of {epochs}",
        ", ".join("–" if value is None else f"{value:.1f}" for value in quarters),
        test,
        f"{found['value_float']:.2f}" if done and found.get("value_float") else "",
        goal,
        published,
        f"{found['seconds_train'] / 3600:.1f}" if done else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY", help="folders, such as runs/records_w2a2")
    parser.add_argument("--curves", type=Path, metavar="DIR", help="write each run's curve there")
    args = parser.parse_args()
    runs = sorted(path.parent for study in args.studies for path in study.glob("*/curves.csv"))
    if not runs:
        raise SystemExit(f"{' '.join(map(str, args.studies))}: no run with a curve")
    goals = pd.read_csv(GOALS)
    print("\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *(row(run, goals) for run in runs)]))
    if args.curves:
        args.curves.mkdir(parents=True, exist_ok=True)
        for run in runs:
            curve(run).to_csv(args.curves / f"{run.parent.name.removeprefix('records_')}_{run.name[:4]}.csv")


if __name__ == "__main__":
    main()
