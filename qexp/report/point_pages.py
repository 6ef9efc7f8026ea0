"""Makes, when a study is finished, the pages of single points from the data files that tasks left."""

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
    """Rebuilds a point's pages whose data is newer, and returns the names of all its pages.

    Data that cannot be displayed is logged and loses its own page, not the study's.
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
