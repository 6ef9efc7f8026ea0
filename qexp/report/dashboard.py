"""The page of a study: one HTML file with data, plots and script inside, that opens without a network."""

import html
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from string import Template

import pandas as pd

from qexp.errors import QexpError
from qexp.report import colours, payload
from qexp.report.figures import figures
from qexp.report.point_pages import write_point_pages
from qexp.results.table_csv import collect
from qexp.system.whole_files import write_text

SCRIPTS = (
    "format",
    "state",
    "theme",
    "filters",
    "overview",
    "cells",
    "board",
    "point",
    "histogram",
    "history",
    "search",
    "main",
)


def write_dashboard(study_dir: str | Path, points: pd.DataFrame | None = None, made_from: str = "") -> Path:
    """Returns the path of the study's `dashboard.html`, rebuilt from its point folders.

    Args:
        study_dir: The study's folder.
        points: What `collect` returned for it, where that is known.
        made_from: A last line of the page, which no reader sees.
    """
    known = {} if points is None else {Path(study_dir): points}
    return write_page([study_dir], Path(study_dir) / "dashboard.html", known=known, made_from=made_from)


def write_page(
    study_dirs: Sequence[str | Path],
    out: Path,
    budget: int = payload.BUDGET,
    known: Mapping[Path, pd.DataFrame] | None = None,
    made_from: str = "",
) -> Path:
    """Writes one page over all the studies to `out`, and returns `out`.

    Args:
        study_dirs: Folders of the studies.
        out: The page.
        budget: See `payload.build`.
        known: What `collect` returned for a folder, where that is known.
        made_from: See `write_dashboard`.

    Raises:
        QexpError: a folder is missing, or none of them holds a point.
    """
    known = known or {}
    frames = {
        Path(folder): known[Path(folder)].copy() if Path(folder) in known else collect(folder) for folder in study_dirs
    }
    same_name = len({folder.resolve().name for folder in frames}) < len(frames)
    for folder, frame in frames.items():
        if same_name:
            frame["study"] = str(folder)
        frame["study_dir"] = str(folder)
        frame["folder"] = [_relative(folder / point, out.parent) for point in frame["point"]]
        frame["pages"] = [" ".join(write_point_pages(folder / point)) for point in frame["point"]]
    skipped = [text for frame in frames.values() for text in frame.attrs["skipped"]]
    df = pd.concat(frames.values(), ignore_index=True) if len(frames) > 1 else next(iter(frames.values()))
    if df.empty:
        where = ", ".join(repr(str(folder)) for folder in frames)
        raise QexpError(f"no point with a readable metrics.json under {where}; give the folder above the point folders")
    return write_text(out, render(df, skipped, budget) + made_from)


def render(df: pd.DataFrame, skipped: Sequence[str] = (), budget: int = payload.BUDGET) -> str:
    """Returns the page as text; `df` needs the columns `study_dir` and `folder` beside those of `collect`."""
    built = payload.build(df, budget)
    studies = list(dict.fromkeys(str(name) for name in df["study"]))
    about = {
        "studies": studies,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "skipped": list(skipped),
        "layers": built["layers"],
        "histograms": built["histograms"],
        "palette": colours.PALETTE,
        "markers": colours.MARKERS,
        "sites": {"weight": colours.WEIGHT, "input": colours.INPUT},
    }
    drawn = figures()
    values = {
        "title": html.escape(" + ".join(studies)),
        "style": _asset("page.css"),
        "bokeh": drawn.library,
        "data": built["data"],
        "about": payload.dump(about),
        "page": "\n".join(_asset(f"{name}.js") for name in SCRIPTS),
        "plots": drawn.script,
        **{f"plot_{name}": div for name, div in drawn.roots.items()},
    }
    return Template(_asset("page.html")).substitute(values)


def _asset(name: str) -> str:
    """Returns the text of one of the page's style or script files."""
    return (files("qexp.report") / "assets" / name).read_text(encoding="utf-8")


def _relative(folder: Path, start: Path) -> str:
    """Returns the path from the page to the folder, for links; empty if there is no such path."""
    try:
        return Path(os.path.relpath(folder, start)).as_posix()
    except ValueError:  # another drive
        return ""
