"""Reads the files of one point's folder besides its metrics: the plan, histograms, curves, configuration."""

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

log = logging.getLogger(__name__)
# The head of a file of booleans `[n]` as `np.save` writes it. numpy parses any head with Python's own parser, in ten times the time.
_PLAIN = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '\|b1', 'fortran_order': False, 'shape': \((\d{1,12}),\), \} *\n", re.DOTALL
)


def read_layers(point_dir: Path) -> pd.DataFrame:
    """Returns `layers.csv`, one row per (layer, site); an empty frame where there is none or it cannot be read."""
    return _csv(point_dir / "layers.csv", required={"layer", "site"})


def layer_columns(point_dir: Path) -> dict[str, tuple[str, ...]]:
    """Returns the columns of `layers.csv` as text; empty where `read_layers` returns no rows.

    Many points of a study share most columns, so that a reader of thousands converts each distinct one only once.
    """
    path = point_dir / "layers.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = [row for row in csv.reader(file, strict=True) if row]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        log.warning("%s is left out: %s", path, error)
        return {}
    if not {"layer", "site"} <= set(head) or any(len(row) > len(head) for row in rows):
        log.warning("%s is left out: no column layer, site, or a line that is too long", path)
        return {}
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    return dict(zip(head, zip(*rows))) if rows else {}


def worst_layer(point_dir: Path) -> str:
    """Returns the tensor with the lowest SQNR in the form `layer3.0.conv1 9.1 dB`, or an empty string."""
    layers = read_layers(point_dir)
    sqnr = pd.to_numeric(layers["sqnr"], errors="coerce").dropna() if "sqnr" in layers else pd.Series(dtype=float)
    return f"{layers.at[sqnr.idxmin(), 'layer']} {sqnr.min():.1f} dB" if len(sqnr) else ""


def read_correct(point_dir: Path) -> np.ndarray | None:
    """Returns which test samples the point got right, booleans `[n]`; None where this is unknown."""
    try:
        content = (point_dir / "correct.npy").read_bytes()
    except OSError:
        return None
    if (plain := _PLAIN.match(content)) and len(content) == plain.end() + int(plain[1]):
        return np.frombuffer(content, dtype=np.uint8, offset=plain.end()) != 0
    try:
        # mapped first: a header may claim more than the file holds, and more than the memory
        kept = np.load(point_dir / "correct.npy", allow_pickle=False, mmap_mode="r")
    except Exception:  # a damaged header fails in the parser of Python's literals, in many ways
        return None
    return np.array(kept) if kept.dtype == bool and kept.ndim == 1 else None


def read_curves(point_dir: Path) -> pd.DataFrame:
    """Returns `curves.csv` (`step, epoch, name, value`); an empty frame where there is none or it cannot be read."""
    return _csv(point_dir / "curves.csv", required={"step", "name", "value"})


def read_history(point_dir: Path) -> pd.DataFrame:
    """Returns `history.csv` (`step, layer, site, scale, ...`); an empty frame where there is none or it cannot be read."""
    return _csv(point_dir / "history.csv", required={"step", "layer", "site", "scale", "oscillating"})


def read_sensitivity(point_dir: Path) -> pd.DataFrame:
    """Returns `sensitivity.csv` (`layer, site, bits, divergence, ...`); an empty frame where there is none or it cannot be read."""
    return _csv(point_dir / "sensitivity.csv", required={"layer", "site", "bits", "divergence"})


def read_trials(point_dir: Path) -> pd.DataFrame:
    """Returns `pareto.csv` (`trial, <goal>, weight_bytes, bops, front, ...`); an empty frame where there is none or it cannot be read."""
    return _csv(point_dir / "pareto.csv", required={"trial", "weight_bytes", "bops", "front"})


def read_accumulator(point_dir: Path) -> pd.DataFrame:
    """Returns `accumulator.csv` (`bits, overflow, value, ...`); an empty frame where there is none or it cannot be read."""
    found = _csv(point_dir / "accumulator.csv", required={"bits", "overflow"})
    return found.rename(columns={"top1": "value"})  # the column's name in earlier versions


def read_depth(point_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns `depth.json`: `layers` (layer, local, total in dB) and `norms` (layer, shift, spread); empty where there is none."""
    path = point_dir / "depth.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is left out: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def read_histograms(point_dir: Path) -> list[dict[str, Any]]:
    """Returns the entries of `histograms.json` that name a layer, a site and counts; an empty list for none."""
    path = point_dir / "histograms.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is left out: %s", path, error)
        return []
    needed = {"layer", "site", "low_edge", "bin_width", "counts"}
    if not isinstance(entries, list):
        log.warning("%s is left out: expected a list, got %s", path, type(entries).__name__)
        return []
    return [entry for entry in entries if isinstance(entry, dict) and needed <= entry.keys() and entry["counts"]]


def _csv(path: Path, required: set[str]) -> pd.DataFrame:
    """Returns the table, or an empty one (with a line in the log) if it is missing, cut off or of another kind."""
    if not path.is_file():
        return pd.DataFrame()
    try:
        # Layers may be called "NA" or "3.10": names stay text, and only an empty field is a gap.
        names = dict.fromkeys(("layer", "site", "name"), str)
        df = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        log.warning("%s is left out: %s", path, error)
        return pd.DataFrame()
    if not required <= set(df.columns):
        log.warning("%s is left out: no column %s", path, ", ".join(sorted(required - set(df.columns))))
        return pd.DataFrame()
    return df
