"""Results as a Markdown table: `python -m experiments.collect runs/STUDY [runs/OTHER] [--where KEY=VALUE] [--paired] [--cost]`.

One row per method (with its passes and settings where the study has several), one column per pair of widths, each cell the accuracy in
percent and the half width of its 95 % interval. With `--paired`, below the table: for each width, which methods the best one beats on the
same images (exact McNemar test, p < 0.05; for detections a bootstrap over images of the difference, 95 %). With `--cost`, a second
table: minutes of calibration, learning and training, and the most memory the process held. With `--column`, another share, such as
map_area or top5. With `--where model=resnet20`, the rows of one network alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from qexp.results import wording
from qexp.results.confidence import mcnemar
from qexp.results.table_csv import collect
from qexp.tasks.mean_ap import Matches, bootstrap, mean_ap

BITS = Path(__file__).parents[1] / "conf" / "bits"


def located(studies: Sequence[Path]) -> pd.DataFrame:
    """Returns the points of several studies, each with its folder."""
    parts = [(study, collect(study)) for study in studies]
    return pd.concat(
        [part.assign(folder=[study / point for point in part.point]) for study, part in parts], ignore_index=True
    )


def table(points: pd.DataFrame, column: str = "value") -> str:
    """Returns the Markdown table of a study's points, of their score or of another column of shares in percent."""
    best = points.get(f"{column}_float", pd.Series(dtype=float)).dropna()
    write = cell if column == "value" else lambda row: f"{row[column]:.2f}" if row.status == "ok" else cell(row)
    return "\n".join([*rows(points, write), f"\nfloat {best.iloc[0]:.2f}" if len(best) else ""])


def rows(points: pd.DataFrame, write: Callable[[pd.Series], str]) -> list[str]:
    """Returns a Markdown table's lines, one row per method, one column per pair of widths, the widest first."""
    # The median over methods: some leave weights in float at every requested width.
    mean = ["mean_wbit", "mean_abit"]
    middle = points.groupby("bits", sort=False)[mean].median()
    widths = list(middle.sort_values(mean, ascending=False, kind="stable").index)
    lines = ["| method | " + " | ".join(widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for name, group in points.groupby("method", sort=False):
        at = {row.bits: write(row) for _, row in group.iterrows()}
        lines.append(f"| {name} | " + " | ".join(at.get(width, "") for width in widths) + " |")
    return lines


def price(row: pd.Series) -> str:
    """Returns the minutes of calibration, learning and training, and the memory, of one point."""
    memory = "" if pd.isna(row.get("peak_mb")) else f", {row.peak_mb:.0f} MiB"
    seconds = row.seconds_calibrate + row.seconds_train
    return (f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s") + memory if row.status == "ok" else ""


def width(wbit: object, abit: object) -> str:
    """Returns what a pair of widths is called: `W4A8`, or for lists network and name of the file in `conf/bits/placed` that sets them.

    >>> width(4, 8), width("[4, ...]", "[4, ...]")
    ('W4A8', 'resnet20_uniform4')
    """
    if "[" in f"{wbit}{abit}":
        for path in sorted((BITS / "placed").glob("*/*.yaml")):
            listed = OmegaConf.to_container(OmegaConf.load(path))
            if [json.dumps(listed[key]).replace('"', "") for key in ("layer_wbit", "layer_abit")] == [
                str(wbit),
                str(abit),
            ]:
                return f"{path.parent.name}_{path.stem}"
    return f"W{wbit}A{abit}"


def label(row: Mapping[str, Any]) -> str:
    """Returns the label of a point's widths: the requested ones, or the mean bits of a plan."""
    if row["layer_wbit"] == wording.PLAN:
        return wording.width(row)
    return width(row["layer_wbit"], row["layer_abit"])


def methods(
    points: pd.DataFrame, telling: Sequence[str] = ("quant", "passes", "plan", "seed", "n_calibrate")
) -> list[str]:
    """Returns each point's label: its quant, its passes where the study has several, and settings where equal names differ."""
    passes = points["passes"].fillna("") if "passes" in points else pd.Series("", points.index)
    several = passes.groupby(points.quant).transform("nunique") > 1
    names = [f"{q} + {p}" if many and p else q for q, p, many in zip(points.quant, passes, several)]
    settings = [flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))) for folder in points.folder]
    out = []
    for name, own in zip(names, settings):
        alike = [other for n, other in zip(names, settings) if n == name]
        at = [
            "plan" if other.get("plan") else f"{other.get('layer_wbit')} {other.get('layer_abit')}" for other in alike
        ]
        keys = [] if len(set(at)) == len(at) else [k for k in own if k.split(".")[0] in telling]
        told = [k for k in keys if len({str(other.get(k)) for other in alike}) > 1 and (k != "plan" or own[k])]
        words = ", ".join(f"{k.rpartition('.')[2]}={own[k]}" for k in told)
        out.append(f"{name} ({words})" if told else name)
    return out


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration as one mapping with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def cell(row: pd.Series) -> str:
    """Returns one accuracy with the half width of its interval, or why there is none."""
    if row.status != "ok":
        return f"failed: {str(row.error)[:40]}"
    return f"{row.value:.2f} ± {(row.ci_high - row.ci_low) / 2:.2f}"


def paired(points: pd.DataFrame) -> str:
    """Returns, for each width, the best method and how it stands against the others on the same images."""
    lines = []
    for width, group in points[points.status == "ok"].groupby("bits", sort=False):
        ranked = group.sort_values("value", ascending=False)
        folders = dict(zip(ranked.method, ranked.folder))
        best, *others = ranked.method
        same = [name for name in others if not told_apart(folders[best], folders[name])]
        lines.append(f"* {width}: {best} is best; not significantly different: {', '.join(same) or 'none'}")
    return "\n".join(lines)


def told_apart(one: Path, other: Path) -> bool:
    """Returns whether two points differ by more than the images they were tested on explain."""
    if (one / "correct.npy").is_file():
        return mcnemar(np.load(one / "correct.npy"), np.load(other / "correct.npy")).p < 0.05
    draws, values = None, []
    for folder in (one, other):
        with np.load(folder / "outcomes.npz") as kept:
            found = Matches(**{name: kept[name] for name in Matches._fields})
        draws = bootstrap(len(found.positives)) if draws is None else draws
        least = flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))["dataset.task.least_boxes"]
        values.append(mean_ap(found, draws, points=11, least=least))
    low, high = np.nanquantile(values[0] - values[1], [0.025, 0.975])
    return bool(low > 0 or high < 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY", help="folders, such as runs/method_shelf")
    parser.add_argument(
        "--where", nargs="*", default=[], metavar="KEY=VALUE", help="of these rows alone: model=resnet20"
    )
    parser.add_argument("--paired", action="store_true", help="compare methods on the same images")
    parser.add_argument("--cost", action="store_true", help="minutes and memory")
    parser.add_argument("--order", nargs="*", default=[], metavar="QUANT", help="recipes in the order of their rows")
    parser.add_argument(
        "--column", default="value", help="what the cells show: value, or another share such as map_area, top5"
    )
    args = parser.parse_args()
    points = located(args.studies)
    for key, _, value in (condition.partition("=") for condition in args.where):
        points = points[points[key].astype(str) == value]
    if points.empty:
        raise SystemExit(
            f"{' '.join(map(str, args.studies))}: no point{' of ' if args.where else ''}{', '.join(args.where)}"
        )
    place = {name: i for i, name in enumerate(args.order)}
    points = points.sort_values(
        "quant", key=lambda names: names.str.split(" + ", regex=False).str[0].map(place), kind="stable"
    ).reset_index(drop=True)
    points["bits"] = [label(row) for row in points.to_dict("records")]
    points["method"] = methods(points)
    print(table(points, args.column))
    if args.cost:
        print("\n" + "\n".join(rows(points, price)))
    if args.paired:
        print("\n" + paired(points))


if __name__ == "__main__":
    main()
