"""The short plain-text table at the end of a run or a sweep."""

import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from qexp.results import wording
from qexp.results.confidence import aggregate_seeds, float_references, ties
from qexp.results.measure import Measure

WIDTH = 100
VARIED = [
    "study",
    "schedule",
    "plan",
    "granularity",
    "rounding",
    "ends_bit",
    "bn",
    "add",
    "quantize_input",
    "n_calibrate",
    "n_eval",
    "weights",
]
WORDS = ("study", "schedule", "weights")  # columns whose values need no name before them


def closing_table(
    df: pd.DataFrame,
    worst: Callable[[str], str] | None = None,
    limit: int = 30,
    correct: Mapping[str, np.ndarray] | None = None,
    marked: Collection[str] = (),
) -> str:
    """Returns the results as an aligned table of at most 100 columns: float first, then every configuration.

    Seeds of one configuration share a line (`± sd`); failed points follow with their error.

    Args:
        df: the table that `collect` returned.
        worst: Returns a text about a point's worst layer, for an extra column.
        limit: greatest number of configurations to print; the most accurate ones are printed.
        correct: point -> which images it got right; with it, a line names the cells that do not differ significantly from the best one.
        marked: Points whose lines begin with `>`: those of the command that prints the table; they are never left out.
    """
    if df.empty:
        return "no results yet"
    blocks = []
    for (model, dataset, _), group in df.groupby(["model", "dataset", "metric"], dropna=False, sort=False):
        measure = Measure.of(group.iloc[0])
        # without the extra column if it leaves too little room for names
        for extra in (worst, None) if worst else (None,):
            head = [
                "method",
                "bits",
                measure.head,
                "95 % interval",
                "drop",
                *(["worst layer"] if extra else []),
                "time",
            ]
            rows = [head, *_lines(group, extra, limit, marked)]
            if _room(rows) >= 0:
                break
        if len(rows) > 1:
            noise = _noise(group, correct) if correct is not None else ""
            blocks.append(f"{_text(model)} on {_text(dataset)}\n{_align(rows)}{noise}")
    failed = [_failure(row) for row in df[df["status"] != "ok"].to_dict("records")]
    if failed:
        blocks.append("\n".join([f"{len(failed)} of {len(df)} points failed:", *failed[:limit]]))
    return "\n\n".join(blocks)


def _lines(
    group: pd.DataFrame, worst: Callable[[str], str] | None, limit: int, marked: Collection[str] = ()
) -> list[list[str]]:
    """Returns the cells of one network's lines: float, the configurations in the order of the table, the number left out."""
    cells, measure = aggregate_seeds(group), Measure.of(group.iloc[0])
    if cells.empty:
        return []
    varied = [name for name in VARIED if name in cells and cells[name].nunique(dropna=False) > 1]
    lines = _float_lines(group, bool(worst))
    mine = set(group.index[group["point"].isin(set(marked))])
    worth = cells["mean"] * measure.sign
    best = set(worth.nlargest(limit).index)
    order = worth.sort_values(ascending=False).index
    kept = [i for i in order if i in best or mine & set(cells.at[i, "rows"])] if len(cells) > limit else []
    shown = cells.loc[kept] if kept else cells
    for cell in shown.to_dict("records"):
        points = group.loc[cell["rows"]]
        # points without a plan have none
        told = [name for name in varied if name != "plan" or _text(cell[name]) != "-"]
        words = [_text(cell[name]) if name in WORDS else f"{name}={_text(cell[name])}" for name in told]
        own = [">"] if set(marked) & set(points["point"]) else []
        method = " ".join([*own, _text(cell["quant"]), *words])
        spread = f" ± {measure.number(cell['sd'])}" if cell["n"] > 1 else ""
        drop = points["drop"].mean()
        line = [
            method,
            wording.width(cell),
            f"{measure.number(cell['mean'])}{spread}",
            _interval(cell, measure),
            measure.number(drop) if drop == drop else "-",
        ]
        if worst:
            line.append(_cut(worst(points["point"].iloc[0]) or "-", 30))
        lines.append([*line, wording.seconds(_seconds(points))])
    return lines if shown is cells else [*lines, [f"the best {limit} of {len(cells)}; all are in results.csv"]]


def _noise(group: pd.DataFrame, correct: Mapping[str, np.ndarray]) -> str:
    """Returns the lines that name the best cell and those that differ from it by chance only; empty for a single cell."""
    cells = aggregate_seeds(group)
    found = ties(cells, group, correct)
    if found is None:
        return ""
    best, tied = found
    measure, means = Measure.of(group.iloc[0]), cells["mean"].to_dict()
    nearest = sorted(tied, key=lambda i: -measure.sign * means[i])[:6]
    name = {i: f"{_text(cells.at[i, 'quant'])} {wording.width(dict(cells.loc[i]))}" for i in (best, *nearest)}
    known = [correct.get(point) is not None for point in group["point"]]
    how = "5 %, paired on the same images" if any(known) else "their 95 % intervals overlap or not"
    if not tied:
        return f"\n\nbest: {name[best]}; every other is {'below' if measure.higher_is_better else 'above'} it beyond chance ({how})"
    listed = ", ".join(name[i] for i in nearest)
    more = f" and {len(tied) - 6} more" if len(tied) > 6 else ""
    text = f"best: {name[best]}; the distance of these from it may be chance ({how}): {listed}{more}"
    return "\n\n" + "\n".join(textwrap.wrap(text, WIDTH))


def _float_lines(group: pd.DataFrame, with_worst: bool) -> list[list[str]]:
    """Returns a line for each float network that the points are compared with; with its weights where there are several."""
    found = float_references(group)
    if found.empty:
        return [["float", "W32A32", "-", "-", "-", *(["-"] if with_worst else []), "-"]]
    named = [name for name in ("study", "weights", "n_eval") if name in found and found[name].nunique(dropna=False) > 1]
    lines = []
    for one in found.to_dict("records"):
        words = [_text(one[key]) if key in WORDS else f"{key}={_text(one[key])}" for key in named]
        name = [wording.reference(one), *words]
        measure = Measure.of(group.iloc[0])
        spread = f" ± {measure.number(one['sd'])}" if one["n"] > 1 else ""
        line = [" ".join(name), "W32A32", f"{measure.number(one['mean'])}{spread}", _interval(one, measure), ""]
        lines.append([*line, *([""] if with_worst else []), ""])
    return lines


def _interval(one: Mapping[str, Any], measure: Measure) -> str:
    """Returns the recorded interval of a line; `-` where there is none."""
    if one["ci_low"] == one["ci_high"] and one["n"] == 1:
        return "-"
    return f"{measure.number(one['ci_low'])} - {measure.number(one['ci_high'])}"


def _seconds(points: pd.DataFrame) -> float:
    """Returns the mean wall time of the points, all phases together."""
    phases = ["seconds_calibrate", "seconds_search", "seconds_train", "seconds_evaluate"]
    return float(points[[name for name in phases if name in points]].sum(axis=1).mean())


def _failure(row: dict[str, Any]) -> str:
    """Returns one line about a failed point."""
    return _cut(f"  {_text(row['quant'])} {wording.width(row)} ({row['point']}): {_text(row['error'])}", WIDTH)


def _widths(lines: list[list[str]]) -> list[int]:
    """Returns the width that each column needs."""
    full = [line for line in lines if len(line) == len(lines[0])]
    return [max(len(line[i]) for line in full) for i in range(len(lines[0]))]


def _room(lines: list[list[str]]) -> int:
    """Returns the number of free columns of the screen; negative where the table is too wide."""
    widths = _widths(lines)
    return WIDTH - sum(widths) - 2 * (len(widths) - 1)


def _align(lines: list[list[str]]) -> str:
    """Returns the lines as text: the first column left-aligned, numbers right-aligned, a rule below the head."""
    widths = _widths(lines)
    widths[0] = max(8, widths[0] + min(0, _room(lines)))  # only names can be shortened
    out = []
    for line in lines:
        line = [_cut(line[0], widths[0]), *line[1:]] if len(line) > 1 else line
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        out.append(_cut("  ".join(cells).rstrip() if len(line) > 1 else line[0], WIDTH))
    out.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(out)


def _text(value: Any) -> str:
    """Returns the value on one line, `-` for none."""
    return "-" if value is None or value != value else " ".join(str(value).split())


def _cut(text: str, length: int) -> str:
    """Returns the text, its end replaced by an ellipsis where it is too long."""
    return text if len(text) <= length else text[: length - 1] + "…"
