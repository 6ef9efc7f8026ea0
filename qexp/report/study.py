"""Ends a study: writes its CSV and its page, and prints its table."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import qexp
from qexp.results.closing_table import closing_table
from qexp.results.run_folder_read import read_correct
from qexp.results.table_csv import collect, write_results
from qexp.system.stamps import stamp

PAGE = "dashboard.html"


def finish(study: Path, marked: Collection[str] = ()) -> None:
    """Writes a study's CSV and page and prints its table and their paths; the lines of the points `marked` begin with `>`.

    A page is left as it is if nothing that it shows, nor the code that makes it, has changed since.
    """
    made_from = _made_from(study)  # before the points are read: a change from now on makes the page again
    points = collect(study)
    csv, page = write_results(study, points), study / PAGE
    if _last_line(page) != made_from:
        from qexp.report.dashboard import write_dashboard  # a second to import, for bokeh

        write_dashboard(study, points, f"\n{made_from}")
    print()
    correct = {p: hits for p in points["point"] if (hits := read_correct(study / p)) is not None}
    print(closing_table(points, correct=correct, marked=marked))
    print(f"\n  table  {csv}\n  page   {page}")
    for point in marked:
        if (study / point).is_dir():
            print(f"  point  {study / point}")


def _made_from(study: Path) -> str:
    """Returns the line, a comment in HTML, that identifies the files of the points and the code of the page."""
    package = Path(qexp.__file__).parent
    folders = sorted(path.parent for path in study.glob("*/metrics.json"))
    files = [path for folder in folders for path in sorted(folder.iterdir()) if not _is_aside(path)]
    return f"<!-- made from {stamp([package / 'report', package / 'results', *files]).digest} -->"


def _is_aside(path: Path) -> bool:
    """Whether a file of a point is no part of the page: a page itself, a log, a lock."""
    return path.is_dir() or path.suffix in (".html", ".txt") or path.name.startswith(".")


def _last_line(page: Path) -> str:
    try:
        with page.open("rb") as file:
            file.seek(-min(200, page.stat().st_size), os.SEEK_END)
            return file.read().decode(errors="replace").rpartition("\n")[2]
    except OSError:
        return ""
