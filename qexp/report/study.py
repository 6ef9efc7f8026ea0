"""Ends a study: writes its CSV and its page, and prints its table."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qexp.report.dashboard import write_dashboard
from qexp.results.closing_table import closing_table
from qexp.results.run_folder_read import read_correct
from qexp.results.table_csv import collect, write_results


def finish(study: Path, marked: Collection[str] = ()) -> None:
    """Writes a study's CSV and page and prints its table and their paths; the lines of the points `marked` begin with `>`."""
    points = collect(study)
    csv = write_results(study, points)
    page = write_dashboard(study, points)
    print()
    correct = {p: hits for p in points["point"] if (hits := read_correct(study / p)) is not None}
    print(closing_table(points, correct=correct, marked=marked))
    print(f"\n  table  {csv}\n  page   {page}")
    for point in marked:
        if (study / point).is_dir():
            print(f"  point  {study / point}")
