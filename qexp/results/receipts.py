"""Receipts: each point of a sweep leaves a small file in the sweep's folder, for the process that started it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qexp.results import wording
from qexp.results.measure import Measure
from qexp.results.remaining import Remaining
from qexp.system.whole_files import write_text


@dataclass(frozen=True)
class Receipt:
    """A point's study, name, status, and result in a few words."""

    study: str
    name: str
    status: str
    result: str

    @classmethod
    def of(cls, study: Path, job: int | None, metrics: Mapping[str, Any]) -> Receipt:
        """Returns the receipt of a job that returned `metrics`; an empty mapping is a failure."""
        name, status = f"{study.name}/{metrics.get('point') or f'job {job}'}", metrics.get("status", "failed")
        words = [str(metrics[key]) for key in ("model", "quant", "schedule") if metrics.get(key)]
        words += [wording.width(dict(metrics))] if metrics else []
        value, measure = metrics.get("value"), Measure.of(metrics)
        known = status == "ok" and wording.is_number(value)
        score = f"{measure.label} {measure.text(value)}" if known else str(status)
        return cls(str(study), name, status, f"{' '.join(words) or name}: {score}")


def leave(folder: Path, job: int, receipt: Receipt) -> None:
    """Writes the receipt of a job into the folder, whole or not at all."""
    write_text(folder / f"{job}.json", json.dumps(asdict(receipt)))


def found(folder: Path) -> dict[str, Receipt | None]:
    """Returns the receipts in a folder by job, in the order in which they were written; None for one that cannot be read."""
    out: dict[str, Receipt | None] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            out[path.stem] = Receipt(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            out[path.stem] = None
    return out


class Watch:
    """Prints a line for each point that other processes finish, until this object is closed.

    Args:
        folder: Folder of the receipts; for points on other machines it lies on a shared file system.
        remaining: Counts the points.
        every: Seconds between two checks.
    """

    def __init__(self, folder: Path, remaining: Remaining, every: float = 1.0) -> None:
        self.folder, self.remaining, self.every = folder, remaining, every
        self._seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Prints the lines of points that finished since the last check, and stops."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._over.wait(self.every)
            for job, receipt in found(self.folder).items():
                if job not in self._seen:
                    self._seen.add(job)
                    print(self.remaining.line(receipt.result if receipt else ""), flush=True)
