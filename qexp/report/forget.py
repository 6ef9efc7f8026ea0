"""Removes points from a study: deletes their folders and rewrites the table and the page."""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from qexp.errors import QexpError, near

EXAMPLES = """examples:
  qexp report forget runs/widths 3fa2b1c04d5e    one point, by its folder or the start of its name
  qexp report forget runs/widths --failed        every point that failed"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(
        prog="qexp report forget",
        description="Remove points from a study: their folders, their rows and their place on the page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("study", type=Path, metavar="STUDY_DIR", help="a study: <runs_dir>/<study>")
    made.add_argument("points", nargs="*", metavar="POINT", help="a point's folder, its name, or the start of its name")
    made.add_argument("--failed", action="store_true", help="all points that failed")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr for a mistake in the command line."""
    args = parser().parse_args(argv)
    try:
        if not args.points and not args.failed:
            raise QexpError("forget: name at least one POINT, or --failed for all that failed")
        gone = forget(args.study, [named(args.study, point) for point in args.points], args.failed)
    except (QexpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.study}: {len(gone)} point{'' if len(gone) == 1 else 's'} forgotten{': ' if gone else ''}{', '.join(gone)}"
    )
    return 0


def forget(study: Path, points: Iterable[str] = (), failed: bool = False) -> list[str]:
    """Removes points of a study and rewrites its table and page; returns the names of those removed.

    Args:
        study: `<runs_dir>/<study>`.
        points: Names of folders in it.
        failed: Also remove every point whose recorded status is `failed`.

    Raises:
        QexpError: There is no such study or point, or a process is working on one; then nothing is removed.
    """
    if not study.is_dir():
        raise QexpError(f"study folder {str(study)!r}: no such folder; give the folder that holds the point folders")
    folders = {study / point for point in points} | (set(_failed(study)) if failed else set())
    for folder in folders:
        if not folder.is_dir():
            raise QexpError(f"{folder}: no such point")
        if _busy(folder):
            raise QexpError(f"{folder}: a process is working on this point; stop it first, nothing was removed")
    for folder in folders:
        shutil.rmtree(folder)
    if folders:
        renew(study)
    return sorted(folder.name for folder in folders)


def renew(study: Path) -> None:
    """Rewrites the table and the page of a study; removes them if no point is left."""
    from qexp.report.dashboard import write_dashboard  # a second to import, which `mistakes` does not need
    from qexp.results.table_csv import collect, write_results

    if len(points := collect(study)):
        write_results(study, points)
        write_dashboard(study, points)
    else:
        for name in ("results.csv", "dashboard.html"):
            (study / name).unlink(missing_ok=True)


def named(study: Path, point: str) -> str:
    """Returns the name of the one point of a study that a path, a name or the start of a name identifies."""
    folder = Path(point)
    if len(folder.parts) > 1 and folder.resolve().parent == study.resolve():
        point = folder.name
    known = sorted(path.parent.name for path in study.glob("*/config.yaml")) if study.is_dir() else []
    known = sorted({*known, *(path.parent.name for path in study.glob("*/metrics.json"))})
    meant = [name for name in known if name == point] or [name for name in known if point and name.startswith(point)]
    if len(meant) != 1:
        what = f"means {len(meant)} points: {', '.join(meant[:4])}" if meant else f"no such point{near(point, known)}"
        raise QexpError(
            f"POINT={point!r}: {what}; the names are the folders in {study}, as in the column point of results.csv"
        )
    return meant[0]


def mistakes(study: Path) -> list[str]:
    """Returns the points whose request was not valid, so that nothing was computed."""
    return [path.name for path in _failed(study, "mistake")]


def _failed(study: Path, flag: str = "status") -> list[Path]:
    found = []
    for path in study.glob("*/metrics.json"):
        try:
            content = path.read_bytes()
            if b'"failed"' not in content:  # parsing the records of a large study takes seconds
                continue
            metrics = json.loads(content.decode("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(metrics, dict) and metrics.get("status") == "failed" and metrics.get(flag):
            found.append(path.parent)
    return found


def _busy(folder: Path) -> bool:
    """Returns whether a process holds the lock of a point."""
    try:
        with (folder / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or a file system without locks
        return False
    return False
