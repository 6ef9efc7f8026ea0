"""The data inside the page: every point's row, its layers, curves and histograms, small enough to send by mail.

Points of one sweep share much: the same layers, the same weights, the same calibration images. So every
column and every histogram is stored once, in a pool, and points refer to it by number.
"""

import json
import logging
import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qexp.results import run_folder_read, wording
from qexp.results.confidence import aggregate_seeds, float_references, rank_ranges, surely_better, upwards
from qexp.results.measure import Measure

log = logging.getLogger(__name__)

BUDGET = 3_300_000  # bytes of embedded data; the plotting library adds 1.3 MB
CURVE_POINTS = 120
HIDDEN = {"study_dir"}
NETWORK = ("model", "dataset", "metric")  # points that differ in these are not compared
COMPARED = 24  # greatest number of cells to compare at one pair of widths
TENSORS = 3000  # greatest number of lines of a sensitivity table
TRIALS = 1000
ACCUMULATOR = ("bits", "overflow", "value", "share")
# measures that are followed during training, beside the scale
FOLLOWED = ("sqnr", "saturation", "levels_used", "oscillating", "frozen")


class Pool:
    """Holds each distinct value once; `add` returns its number."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self.size = 0
        self._index: dict[str, int] = {}
        self._columns: dict[tuple[str, ...], int | None] = {}

    def add(self, value: Any) -> int:
        """Returns the number of the value, storing it at its first appearance."""
        text = dump(value)
        if text not in self._index:
            self._index[text] = len(self.values)
            self.values.append(text)
            self.size += len(text) + 1
        return self._index[text]

    def column(self, texts: tuple[str, ...], names: bool = False) -> int | None:
        """Returns the number of a column of a table, given as text; None for one without values.

        Args:
            texts: Its fields; an empty one is a gap.
            names: Whether the fields stay text, whatever they look like.
        """
        key = (*texts, "names") if names else texts
        if key not in self._columns:
            values = [text or None for text in texts] if names else parsed(texts)
            self._columns[key] = self.add(tidy(values, 4)) if any(v is not None for v in values) else None
        return self._columns[key]


def build(df: pd.DataFrame, budget: int = BUDGET) -> dict[str, Any]:
    """Returns `{"data": JSON text for the page, "layers": n, "histograms": n}`, n = points embedded with those.

    Args:
        df: rows of one or several studies as `collect` returns them, with a column `study_dir`.
        budget: greatest size of the JSON in bytes; layers come first, best points first, then errors by depth, curves, histories,
            histograms.
    """
    correct = _correct(df)
    df = rank(df, correct)
    cells = aggregate_seeds(df)
    cells["near"] = near(cells, df, correct)
    head = {
        "rows": packed(df.drop(columns=list(HIDDEN & set(df.columns)))),
        "cells": packed(cells),
        "references": [_record(one) for one in float_references(df).to_dict("records")],
        "paired": bool(correct),
    }
    pool = Pool()
    points: list[dict[str, Any]] = [{} for _ in range(len(df))]
    worth = df["value"] * np.array([measure.sign for measure in _measures(df)])
    order = df.assign(worth=worth).sort_values(["rank_low", "worth"], ascending=[True, False], kind="stable").index
    folders = [Path(study, point) for study, point in zip(df["study_dir"], df["point"])]
    used = len(dump(head))
    embedded = {}
    for name, read, share in READERS:
        embedded[name] = 0
        for i in order:
            if used + pool.size > share * budget:
                break
            try:
                value = read(folders[i], pool)
            except Exception as error:  # a damaged file loses its own figure only, not the page
                log.warning("%s of %s are left out: %r", name, folders[i], error)
                continue
            if value is not None:
                points[i][name] = value
                used += len(dump(value)) + len(name) + 4
                embedded[name] += 1
            elif name == "histograms" and not (folders[i] / "histograms.json").is_file():
                points[i]["none"] = 1
    text = f'{{"pool":[{",".join(pool.values)}],"points":{dump(points)},{dump(head)[1:]}'
    return {"data": text, **embedded}


def rank(df: pd.DataFrame, correct: Mapping[int, np.ndarray] | None = None) -> pd.DataFrame:
    """Returns the rows with `rank_low`, `rank_high`: the range of ranks that is possible by chance among comparable points.

    Comparable are points of one network, data set and measure. `rank_low == 1` means "chance may have put it below the best".

    Args:
        df: One row per point.
        correct: Per row, which images it got right; such rows are compared on the same images, others by their intervals.
    """
    df, correct = df.copy(), correct or {}
    df["rank_low"], df["rank_high"] = math.nan, math.nan
    ok = df[(df["status"] == "ok") & df["value"].notna()]
    for _, group in ok.groupby(list(NETWORK), dropna=False) if len(ok) else []:
        ends = (group[name].to_numpy(float) for name in ("value", "ci_low", "ci_high"))
        ranges = rank_ranges(*upwards(*ends, Measure.of(group.iloc[0])), [correct.get(i) for i in group.index])
        df.loc[group.index, ["rank_low", "rank_high"]] = np.array(ranges, dtype=float)
    return df


def near(cells: pd.DataFrame, df: pd.DataFrame, correct: Mapping[int, np.ndarray]) -> list[list[int]]:
    """Returns, per cell, the cells of the same network and widths that do not differ significantly; only the most accurate ones."""
    found: list[list[int]] = [[] for _ in range(len(cells))]
    if cells.empty:
        return found
    width = pd.Series([wording.width(cell) for cell in cells.to_dict("records")], index=cells.index, name="width")
    for _, group in cells.groupby([*(cells[name] for name in NETWORK), width], dropna=False):
        measure = Measure.of(group.iloc[0])
        top = group.loc[(group["mean"] * measure.sign).nlargest(COMPARED).index]
        hits = [correct.get(rows[0]) if len(rows) == 1 else None for rows in top["rows"]]
        ends = (top[name].to_numpy(float) for name in ("mean", "ci_low", "ci_high"))
        sure = surely_better(*upwards(*ends, measure), hits)
        open_ = ~(sure | sure.T)
        for i, index in enumerate(top.index):
            found[index] = [int(other) for j, other in enumerate(top.index) if open_[i, j] or j == i]
    return found


def _correct(df: pd.DataFrame) -> dict[int, np.ndarray]:
    """Returns which images each row's point got right, where its folder holds this."""
    folders = zip(df.index, df["study_dir"], df["point"])
    kept = ((i, run_folder_read.read_correct(Path(study, point))) for i, study, point in folders)
    return {i: hits for i, hits in kept if hits is not None}


def _measures(df: pd.DataFrame) -> list[Measure]:
    """Returns the measure of each row."""
    names = [name for name in ("metric", "metric_label", "unit", "is_share", "higher_is_better") if name in df]
    known: dict[tuple, Measure] = {}
    found = []
    for values in zip(*(df[name] for name in names)):
        key = tuple((type(value), str(value)) for value in values)
        if key not in known:
            known[key] = Measure.of(dict(zip(names, values)))
        found.append(known[key])
    return found if names else [Measure.of({})] * len(df)


def dump(value: Any) -> str:
    """Returns compact JSON, which is safe inside a `<script>` element for any text in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def tidy(value: Any, digits: int = 6) -> Any:
    """Returns the value in a form for JSON: numbers rounded to that many digits, gaps and infinities as None."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [tidy(item, digits) for item in value]
    if isinstance(value, dict):
        return {str(key): tidy(item, digits) for key, item in value.items()}
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        rounded = float(f"{float(value):.{digits}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return str(value)


def parsed(texts: tuple[str, ...]) -> list[Any]:
    """Returns the fields of a column as whole numbers, numbers, or true and false, if all are; else as text. An empty field is None.

    >>> parsed(("3", "4")), parsed(("3", "")), parsed(("True", "False")), parsed(("3.10", "b"))
    ([3, 4], [3.0, None], [True, False], ['3.10', 'b'])
    """
    given = [text for text in texts if text]
    if given and all(text in ("True", "False") for text in given):
        return [None if not text else text == "True" for text in texts]
    try:
        if any("_" in text for text in given):
            raise ValueError
        numbers = [float(text) for text in given]
    except ValueError:
        return [text or None for text in texts]
    if len(given) == len(texts) and all(text.lstrip("+-").isdigit() for text in given):
        return [int(text) for text in texts]
    known = iter(numbers)
    return [next(known) if text else None for text in texts]


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row without its gaps, and with its widths in words."""
    clean = {str(name): value for name, item in row.items() if (value := tidy(item)) not in (None, "", [])}
    return {**clean, "width": wording.width(row)}


def packed(df: pd.DataFrame) -> dict[str, Any]:
    """Returns the rows of a table in a form that the page unpacks: thousands of points differ in few fields.

    `length` is the number of rows; `common` holds what is the same in all of them, where there are several; `columns` holds the other
    columns, a gap as null. A column of few different values is `{"of": the values, "at": the place of each row's in them, -1 for a gap}`.
    """
    columns = {str(name): _tidied(df[name].tolist()) for name in df} | {"width": _widths(df)}
    common = {name: values[0] for name, values in columns.items() if len(df) > 1 and _is_one(values)}
    kept = {name: values for name, values in columns.items() if name not in common}
    coded = {name: _coded(values) for name, values in kept.items() if any(value is not None for value in values)}
    return {"length": len(df), "common": common, "columns": coded}


def _tidied(values: list[Any]) -> list[Any]:
    """Returns a column's values in a form for JSON, empty ones as gaps; each distinct value is converted once."""
    known: dict[tuple[type, Any], Any] = {}
    out = []
    for value in values:
        key = _key(value)
        if key not in known:
            clean = tidy(value)
            known[key] = None if clean in ("", []) else clean
        out.append(known[key])
    return out


def _widths(df: pd.DataFrame) -> list[str]:
    """Returns the widths of each row in words."""
    names = [name for name in wording.WIDTHS if name in df]
    known: dict[str, str] = {}
    out = []
    for values in zip(*(df[name] for name in names)) if names else [()] * len(df):
        key = repr(values)
        if key not in known:
            known[key] = wording.width(dict(zip(names, values)))
        out.append(known[key])
    return out


def _is_one(values: list[Any]) -> bool:
    """Returns whether all values of a column are the same one; 1 and true are not."""
    first = values[0]
    return first is not None and all(type(value) is type(first) and value == first for value in values)


def _coded(values: list[Any]) -> list[Any] | dict[str, list[Any]]:
    """Returns a column as it is, or by the places of its different values where these are few."""
    keys = [_key(value) for value in values]
    of = {key: value for key, value in zip(keys, values) if value is not None}
    if len(values) < 20 or len(of) > len(values) // 2:
        return values
    places = {key: i for i, key in enumerate(of)}
    return {"of": list(of.values()), "at": [places.get(key, -1) for key in keys]}


def _key(value: Any) -> tuple[type, Any]:
    """Returns what tells a value from others: 1 and true are equal, lists cannot be looked up."""
    return type(value), value if isinstance(value, Hashable) else repr(value)


def _layers(folder: Path, pool: Pool) -> dict[str, int] | None:
    """Returns column -> number in the pool of the point's plan, columns without any value left out."""
    columns = run_folder_read.layer_columns(folder)
    found = {name: pool.column(texts, name in ("layer", "site", "name")) for name, texts in columns.items()}
    return {name: number for name, number in found.items() if number is not None} or None


def _curves(folder: Path, pool: Pool) -> dict[str, list[int]] | None:
    """Returns name -> numbers of its steps and of its values, thinned to what a screen can display."""
    df = run_folder_read.read_curves(folder)
    if df.empty:
        return None
    df = df.assign(value=pd.to_numeric(df["value"], errors="coerce"), step=pd.to_numeric(df["step"], errors="coerce"))
    curves = {}
    for name, curve in df.dropna(subset=["step", "value"]).groupby("name", sort=False):
        keep = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), CURVE_POINTS)).round().astype(int))
        x, y = (tidy(curve[column].iloc[keep].tolist(), 4) for column in ("step", "value"))
        curves[str(name)] = [pool.add(x), pool.add(y)]
    return curves or None


def _depth(folder: Path, pool: Pool) -> dict[str, Any] | None:
    """Returns the numbers in the pool of `layer`, `local` and `total` (dB) in order of execution, and the batch norms' drift."""
    found = run_folder_read.read_depth(folder)
    layers = found.get("layers") or []
    if not layers:
        return None
    columns = {name: pool.add(tidy([entry[name] for entry in layers], 4)) for name in ("layer", "local", "total")}
    norms = found.get("norms") or []
    worst = max(norms, key=lambda n: n["shift"] ** 2 + math.log(max(n["spread"], 1e-9)) ** 2, default=None)
    return columns | ({"norm": tidy([worst["layer"], worst["shift"], worst["spread"]], 3)} if worst else {})


def _sensitivity(folder: Path, pool: Pool) -> dict[str, int] | None:
    """Returns the numbers in the pool of `layer`, `site`, `bits` and the measures of the loss when that tensor alone has those bits."""
    df = run_folder_read.read_sensitivity(folder).head(TENSORS)
    names = [name for name in ("layer", "site", "bits", "divergence", "drop") if name in df and df[name].notna().any()]
    return {name: pool.add(tidy(df[name].tolist(), 4)) for name in names} if len(df) else None


def _trials(folder: Path, pool: Pool) -> dict[str, Any] | None:
    """Returns the search's goal and the numbers in the pool of each trial's score and costs; those on the front always stay."""
    df = run_folder_read.read_trials(folder)
    if df.empty:
        return None
    df["front"] = df["front"].astype(str).str.lower() == "true"
    df = df.sort_values("front", ascending=False, kind="stable").head(TRIALS)
    goal = next(name for name in df.columns if name not in ("trial", "weight_bytes", "bops", "front"))
    columns = {name: pool.add(tidy(df[name].tolist(), 5)) for name in ("trial", "weight_bytes", "bops", "front")}
    return {"goal": goal, **columns, "score": pool.add(tidy(df[goal].tolist(), 5))}


def _accumulator(folder: Path, pool: Pool) -> dict[str, int] | None:
    """Returns the numbers in the pool of the columns of the accumulator study: bits, kind of overflow, score, share that overflows."""
    df = run_folder_read.read_accumulator(folder)
    return (
        {name: pool.add(tidy(df[name].tolist(), 5)) for name in ACCUMULATOR if name in df}
        if len(df) and "value" in df and df["value"].notna().any()
        else None
    )


def _history(folder: Path, pool: Pool) -> list[list[Any]] | None:
    """Returns `[layer, site, steps in the pool, {measure: values in the pool}]` for each quantizer that was followed in training."""
    df = run_folder_read.read_history(folder)
    if df.empty:
        return None
    df = df.assign(
        levels_used=100 * df["levels_used"] / df["levels"], scale=pd.to_numeric(df["scale"], errors="coerce")
    )
    out = []
    for (layer, site), part in df.groupby(["layer", "site"], sort=False):
        values = {"scale": part["scale"] / part["scale"].iloc[0]} | {n: part[n] for n in FOLLOWED if n in part}
        known = {n: pool.add(tidy(v.tolist(), 4)) for n, v in values.items() if v.notna().any()}
        out.append([str(layer), str(site), pool.add(tidy(part["step"].tolist())), known])
    return out


def _histograms(folder: Path, pool: Pool) -> list[list[Any]] | None:
    """Returns `[layer, site, counts in the pool, low, high, levels in the pool]` for each histogram."""
    out = []
    for entry in run_folder_read.read_histograms(folder):
        counts = [int(float(f"{count:.3g}")) for count in entry["counts"]]
        shape = [entry["low_edge"], entry["bin_width"], counts, entry.get("zeros"), entry.get("count")]
        levels = _spaced(entry.get("levels") or [])
        chosen = tidy([entry.get("low"), entry.get("high")], 4)
        out.append([str(entry["layer"]), str(entry["site"]), pool.add(tidy(shape, 4)), *chosen, levels])
    return out or None


def _spaced(levels: list[float]) -> list[float] | dict[str, list[float]]:
    """Returns evenly spaced levels as `[first, last, how many]`, others as `{"at": levels}`."""
    if len(levels) < 3:
        return {"at": tidy(levels, 4)}
    gaps = np.diff(np.asarray(levels, float))
    if np.allclose(gaps, gaps[0], rtol=1e-3):
        return [*tidy([levels[0], levels[-1]], 5), len(levels)]
    return {"at": tidy(levels, 4)}


# The share of the budget up to which each reader may fill it, so that room is left for the histograms of the best points.
READERS = (
    ("layers", _layers, 1),
    ("sensitivity", _sensitivity, 1),
    ("trials", _trials, 1),
    ("accumulator", _accumulator, 1),
    ("depth", _depth, 0.8),
    ("curves", _curves, 0.8),
    ("history", _history, 0.7),
    ("histograms", _histograms, 1),
)
