"""The pages of single points that tasks left data for, by the name of the file: made when a study is finished."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from qexp.errors import QexpError

log = logging.getLogger(__name__)


def _detections(folder: Path) -> Path:
    from qexp.report.detections import write_detections

    return write_detections(folder)


def _verification(folder: Path) -> Path:
    from qexp.report.verification import write_verification

    return write_verification(folder)


PAGES: dict[str, tuple[str, Callable[[Path], Path]]] = {  # a task's file -> its page, and what makes it
    "detections.json": ("detections.html", _detections),
    "pairs.csv": ("verification.html", _verification),
}


def write_point_pages(folder: Path) -> list[str]:
    """Returns the names of a point's pages after those whose data is newer were made again.

    Data that cannot be shown costs its own page, with a line in the log, and not the study's.
    """
    for file, (page, write) in PAGES.items():
        source, made = folder / file, folder / page
        if not source.is_file() or (made.is_file() and made.stat().st_mtime_ns >= source.stat().st_mtime_ns):
            continue
        try:
            write(folder)
        except (QexpError, OSError, ValueError, KeyError, AttributeError) as error:
            log.warning("%s: no page could be made of it: %s", source, error)
    return sorted(page.name for page in folder.glob("*.html"))
