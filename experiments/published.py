"""Published figures beside ours: `python -m experiments.published experiments/STUDY/targets.csv runs/STUDY [runs/OTHER ...]`.

A target is a line `model,dataset,quant,wbit,abit,float,value,tolerance,source,needs`: what was published for that network, method and
pair of widths (percent), and how far from it counts as reproduced (points). What is compared is the loss against float, since float
networks differ; ours is the mean over seeds. Of several settings of a method the best is shown, and named. A network trained with
quantizers from random weights has no float network of its own: it is held against the one that was trained in float (`schedule=float`) in
the same study. `dataset` may name several with `|`: a target of ImageNet's validation images is compared on whichever images were run,
and the table says on which. `needs` says what a machine must have to run a row that has not been run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from experiments.collect import located, methods, width

COLUMNS = ("model", "dataset", "quant", "wbit", "abit", "float", "value", "tolerance", "source", "needs")


def read_targets(path: Path) -> pd.DataFrame:
    """Returns the targets, checked.

    Raises:
        ValueError: A column is missing, or a target has no number or no source.
    """
    targets = pd.read_csv(path, dtype={"wbit": str, "abit": str}, keep_default_na=False)
    if missing := set(COLUMNS) - set(targets.columns):
        raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing")
    for name in ("float", "value", "tolerance"):
        targets[name] = pd.to_numeric(targets[name])
    if not targets.source.str.len().gt(0).all():
        raise ValueError(f"{path}: every target names its source")
    return targets


def matching(points: pd.DataFrame, target: pd.Series) -> pd.DataFrame:
    """Returns the finished points of a target's network, images, method and widths."""
    return points[
        (points.status == "ok")
        & (points.model == target.model)
        & points.dataset.isin(target.dataset.split("|"))
        & (points.quant == target.quant)
        & (points.layer_wbit.astype(str) == target.wbit)
        & (points.layer_abit.astype(str) == target.abit)
    ]


def best_setting(found: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Returns the points of the setting with the highest mean where a method was run with several, and that setting."""
    if len(found) < 2 or "folder" not in found:  # a table without folders has no settings
        return found, ""
    names = pd.Series(methods(found, ("quant", "passes", "n_calibrate")), found.index)
    best = found.value.groupby(names).mean().idxmax()
    return found[names == best], best.removeprefix(found.quant.iloc[0]).strip() if names.nunique() > 1 else ""


def float_scores(points: pd.DataFrame) -> pd.DataFrame:
    """Returns the points with float scores where they had none: those of networks trained in float on the same images."""
    if not {"value", "value_float", "schedule"} <= set(points):
        return points
    trained = points[(points.status == "ok") & (points.schedule == "float")].groupby(["model", "dataset"]).value.mean()
    there = [trained.get((model, dataset)) for model, dataset in zip(points.model, points.dataset)]
    scores = points.value_float.fillna(pd.Series(there, points.index, dtype=float))
    return points.assign(value_float=scores, drop=points["drop"].fillna(scores - points.value))


def line(target: pd.Series, found: pd.DataFrame) -> str:
    """Returns one row of the table."""
    paper = target.float - target.value
    asked = f"{target.model} | {target.quant} | {width(target.wbit, target.abit)}"
    head = f"| {asked} | {target.float:.2f} → {target.value:.2f} ({paper:+.2f}) |"
    if found.empty:
        return f"{head} | not run: needs {target.needs or 'time'} | {target.source} |"
    found, setting = best_setting(found)
    drop, value, half = found["drop"].mean(), found.value.mean(), ((found.ci_high - found.ci_low) / 2).mean()
    spread = f", sd {found.value.std():.2f} of {len(found)} seeds" if len(found) > 1 else ""
    near = abs(drop - paper) <= target.tolerance + half
    verdict = "reproduced" if near else "better" if drop < paper else "worse"
    if pd.isna(drop):
        return f"{head} {value:.2f} ± {half:.2f}{spread} | no float network beside it | {target.source} |"
    images = "" if list(found.dataset.unique()) == [target.dataset] else f" on {found.dataset.iloc[0]}"
    ours = f"{found.value_float.mean():.2f} → {value:.2f} ± {half:.2f} ({drop:+.2f}){spread}{images}{setting and ' ' + setting}"
    return f"{head} {ours} | {verdict} (±{target.tolerance:g}) | {target.source} |"


def table(targets: pd.DataFrame, points: pd.DataFrame) -> str:
    """Returns the Markdown table of targets and what came out."""
    lines = [
        "| network | method | bits | published: float → quantized (loss) | ours | verdict | source |",
        "|---" * 7 + "|",
    ]
    lines += [line(target, matching(points, target)) for _, target in targets.iterrows()]
    run = sum("not run" not in text for text in lines[2:])
    return "\n".join([*lines, f"\n{run} of {len(targets)} rows run."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", type=Path)
    parser.add_argument("studies", type=Path, nargs="+")
    args = parser.parse_args()
    studies = [folder for folder in args.studies if folder.is_dir()]
    empty = pd.DataFrame(columns=["status", "model", "dataset", "quant", "layer_wbit", "layer_abit"])
    print(table(read_targets(args.targets), float_scores(located(studies)) if studies else empty))


if __name__ == "__main__":
    main()
