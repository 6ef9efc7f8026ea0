"""The tables of this study: `python -m experiments.search.collect runs/STUDY`.

Accuracies by method and widths; each searched plan against the uniform one whose cost was its budget, on the same images; what the search
took.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.collect import table
from qexp.results import wording
from qexp.results.confidence import Z95, mcnemar
from qexp.results.table_csv import collect


def named(study: Path) -> pd.DataFrame:
    """Returns the points of a study with the columns that name them, uniform plans first."""
    points = collect(study)
    points["bits"] = [
        wording.width(row) if row["layer_wbit"] == wording.PLAN else wording.asked(row)
        for row in points.to_dict("records")
    ]
    points["method"] = points.quant
    return points.sort_values("quant", key=lambda names: names.str.len(), kind="stable").reset_index(drop=True)


def against_uniform(points: pd.DataFrame, study: Path) -> list[str]:
    """Returns the Markdown table of searched plans against uniform ones: cost, difference with its interval, exact McNemar test."""
    lines = [
        "| widths | plan | weight bytes | bit operations | gain, points | images gained / lost | p |",
        "|---" * 7 + "|",
    ]
    done = points[points.status == "ok"]
    for bits, group in done.groupby("bits", sort=False):
        base = group[~group.quant.str.contains("+", regex=False)]
        for row in group.drop(base.index).itertuples() if len(base) == 1 else ():
            uniform = base.iloc[0]
            one, other = (np.load(study / point / "correct.npy") for point in (uniform.point, row.point))
            found, n = mcnemar(one, other), len(one)
            apart = found.only_a + found.only_b
            half = 100 * Z95 * np.sqrt(apart - (found.only_b - found.only_a) ** 2 / n) / n
            cost = (100 * getattr(row, kind) / uniform[kind] for kind in ("weight_bytes", "bops"))
            p = f"{found.p:.2g}" if found.p >= 1e-4 else "< 0.0001"
            shares = " | ".join(f"{share:.1f} %" for share in cost)
            lines.append(
                f"| {bits} | {row.quant} | {shares} | {found.difference:+.2f} ± {half:.2f} | {found.only_b} / {found.only_a} | {p} |"
            )
    return lines


def price(points: pd.DataFrame, study: Path) -> str:
    """Returns what the sensitivities took beside an evaluation of each case on all test images, reckoned from what one takes."""
    done = points[points.status == "ok"]
    if "seconds_sensitivity" not in done or done.seconds_sensitivity.isna().all():
        return ""
    row = done.loc[done.seconds_sensitivity.idxmax()]  # the point that measured them; others read them
    cases = pd.read_csv(study / row.point / "sensitivity.csv")
    tensors, widths = len(cases[["layer", "site"]].drop_duplicates()), cases.bits.nunique()
    once = done[~done.quant.str.contains("+", regex=False)].seconds_evaluate.median()
    return (
        f"Sensitivities: {tensors} tensors x {widths} widths = {len(cases)} cases on {row.search_images:.0f} images in "
        f"{row.seconds_sensitivity:.0f} s. One evaluation of the {row.n_eval:.0f} test images took {once:.0f} s, so {len(cases)} of them "
        f"would take {len(cases) * once:.0f} s, **{len(cases) * once / row.seconds_sensitivity:.0f} times** as long."
    )


def report(study: Path) -> str:
    """Returns all tables of a study."""
    points = named(study)
    return "\n\n".join([table(points).strip(), "\n".join(against_uniform(points, study)), price(points, study)]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's folder, such as runs/search_resnet20")
    print(report(parser.parse_args().study))


if __name__ == "__main__":
    main()
