"""The table of a study: one row per point, rebuilt from the `metrics.json` files and never appended to."""

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd

from qexp.errors import QexpError
from qexp.results.confidence import seed_columns
from qexp.results.measure import Measure
from qexp.system.whole_files import write_text

log = logging.getLogger(__name__)

COLUMNS = (
    *("study", "point", "status", "error", "model", "dataset", "quant", "schedule", "layer_wbit", "layer_abit"),
    *("mean_wbit", "mean_abit", "seed", "metric", "value", "value_float", "drop", "ci_low", "ci_high", "n_eval"),
    *("params", "macs", "quantized_macs", "bops", "weight_bytes", "weight_bytes_float"),
    *("seconds_calibrate", "seconds_train", "seconds_evaluate"),
    *("device", "kernels", "torch", "commit", "rounding", "granularity", "ends_bit", "bn", "add"),
    *("quantize_input", "n_calibrate", "weights"),
)
WHOLE = ("seed", "n_eval", "params", "macs", "bops", "weight_bytes", "weight_bytes_float", "n_calibrate")
REAL = (
    *("mean_wbit", "mean_abit", "value", "value_float", "drop", "ci_low", "ci_high"),
    *("seconds_calibrate", "seconds_train", "seconds_evaluate"),
)
NAMES = (
    "study",
    "point",
    "status",
    "model",
    "dataset",
    "quant",
    "schedule",
    "metric",
    "metric_label",
    "unit",
    "weights",
    "plan",
    "reference",
    "request",
)
DEPTH, LARGEST = 8, 2**63  # limits on the values of a record
ORDER = ["study", "model", "dataset", "quant", "schedule", "mean_wbit", "mean_abit", "seed", "point"]


def collect(study_dir: str | Path) -> pd.DataFrame:
    """Returns one row per point of the study; the columns of `COLUMNS` come first, then all others that were recorded.

    A failed point keeps its row until one of the same request succeeds, also if a file was missing or damaged before.
    A `metrics.json` that cannot be read (cut off by a crash, not JSON, not a mapping) is logged and listed in
    `df.attrs["skipped"]`; the other points are still read.

    Raises:
        QexpError: the folder does not exist.
    """
    study_dir = Path(study_dir)
    if not study_dir.is_dir():
        raise QexpError(
            f"study folder {str(study_dir)!r}: no such folder; give the folder that holds the point folders"
        )
    rows, skipped = [], []
    for path in sorted(study_dir.glob("*/metrics.json")):
        try:
            rows.append(_row(path))
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s is left out: %s", path, error)
            skipped.append(f"{path.parent.name}: {error}")
    done = {row["request"] for row in rows if row["status"] == "ok" and row.get("request")}
    rows = [row for row in rows if row["status"] == "ok" or row.get("request") not in done]
    extra = sorted({name for row in rows for name in row} - set(COLUMNS))
    df = pd.DataFrame(rows, columns=[*COLUMNS, *extra])
    for name in REAL:
        df[name] = pd.to_numeric(df[name], errors="coerce").astype(float)
    for name in WHOLE:
        df[name] = _whole(df[name])
    df = df.sort_values(ORDER, ascending=[name not in ("mean_wbit", "mean_abit") for name in ORDER], kind="stable")
    df = df.reset_index(drop=True)
    df.attrs["skipped"] = skipped
    return df


def _row(path: Path) -> dict[str, Any]:
    """Returns the record of one point, with the names of its study and folder filled in."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a mapping of names to values, got {type(row).__name__}")
    _check(row)
    row.setdefault("study", path.parent.parent.name)
    row["point"] = path.parent.name
    row.setdefault("status", "ok" if row.get("value") is not None else "failed")
    if row.get("metric") is not None:  # the default for records without these columns: shares where more is better
        row = row | {k: v for k, v in Measure.of(row).columns().items() if row.get(k) is None}
    return {name: _plain(name, value) for name, value in row.items()}


def _check(value: Any, depth: int = 0) -> None:
    """Raises if a record holds values that no run writes and that tables and pages cannot hold."""
    if depth > DEPTH:
        raise ValueError(f"nested more than {DEPTH} deep")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise ValueError(
            f"an integer of {len(str(value))} digits" if abs(value) < 10**4000 else "an integer of thousands of digits"
        )
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(inner, depth + 1)


def _plain(name: str, value: Any) -> Any:
    """Returns a value by which rows can be sorted and grouped: names as text, lists and mappings as JSON."""
    if name in NAMES and value is not None:
        return value if isinstance(value, str) else json.dumps(value)
    return json.dumps(value) if name in COLUMNS and isinstance(value, (list, dict)) else value


def _whole(column: pd.Series) -> pd.Series:
    """Returns the column as integers with gaps, or as floats where a value is not whole."""
    column = pd.to_numeric(column, errors="coerce").astype(float)
    return column.astype("Int64") if (column.dropna() % 1 == 0).all() else column


def write_results(study_dir: str | Path, points: pd.DataFrame | None = None) -> Path:
    """Returns the path of `results.csv`, rebuilt from the points and replaced in one step.

    Where a configuration ran with several seeds, its rows also hold the statistics over them (`seed_columns`).

    Args:
        study_dir: The study's folder.
        points: What `collect` returned for it, where that is known.
    """
    df = collect(study_dir) if points is None else points
    path = Path(study_dir) / "results.csv"
    several = seed_columns(df).dropna(how="all", axis="columns")
    texts = df.assign(**{name: df[name].map(_cell) for name in df if df[name].dtype == object})
    return write_text(path, texts.join(several).to_csv(index=False))


def _cell(value: Any) -> Any:
    """Returns lists and mappings as JSON text, everything else as it is."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value
