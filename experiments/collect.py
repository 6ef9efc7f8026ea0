"""A study's results as a Markdown table: `python -m experiments.collect runs/STUDY [--paired]`.

One row a method, one column a pair of widths, each cell the accuracy in percent and the half width of its 95 % interval. With `--paired`,
below the table: for each width, which methods the best one beats on the same images (exact McNemar test, p < 0.05).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from qexp.report.results import collect
from qexp.report.statistics import mcnemar


def table(points: pd.DataFrame) -> str:
    """Returns the Markdown table of a study's points."""
    widths = list(dict.fromkeys(points.bits))
    lines = ["| method | " + " | ".join(widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for name, group in points.groupby("quant", sort=False):
        cells = []
        for width in widths:
            row = group[group.bits == width]
            cells.append(cell(row.iloc[0]) if len(row) else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    best = points.value_float.dropna()
    return "\n".join([*lines, f"\nfloat {best.iloc[0]:.2f}" if len(best) else ""])


def cell(row: pd.Series) -> str:
    """Returns one accuracy with the half width of its interval, or why there is none."""
    if row.status != "ok":
        return f"failed: {str(row.error)[:40]}"
    return f"{row.value:.2f} ± {(row.ci_high - row.ci_low) / 2:.2f}"


def paired(points: pd.DataFrame, study: Path) -> str:
    """Returns, for each width, the best method and how it stands against the others on the same images."""
    lines = []
    for width, group in points[points.status == "ok"].groupby("bits", sort=False):
        ranked = group.sort_values("value", ascending=False)
        hits = {row.quant: np.load(study / row.point / "correct.npy") for row in ranked.itertuples()}
        best, *others = ranked.quant
        same = [name for name in others if mcnemar(hits[best], hits[name]).p >= 0.05]
        lines.append(f"* {width}: {best} is best; not told apart from it: {', '.join(same) or 'none'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's folder, such as runs/method_shelf")
    parser.add_argument("--paired", action="store_true", help="compare methods on the same images")
    args = parser.parse_args()
    points = collect(args.study)
    points["bits"] = [f"W{w}A{a}" for w, a in zip(points.layer_wbit, points.layer_abit)]
    print(table(points))
    if args.paired:
        print("\n" + paired(points, args.study))


if __name__ == "__main__":
    main()
