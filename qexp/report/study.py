"""The Hydra callback that ends a run or a sweep: the table, the CSV and the page of each study it wrote to."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class StudyPage(Callback):
    """Rebuilds `results.csv` and `dashboard.html` when a run or a sweep ends, prints the table, and exits non-zero if a point failed.

    Which studies a sweep wrote to is read from the jobs that ran in this process, and from the run folders that changed meanwhile, so that
    a sweep over models or data sets and one whose points ran elsewhere both end with their pages.
    """

    def __init__(self) -> None:
        self.studies: list[Path] = []
        self.failed: set[str] = set()
        self.started = time.time()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.started = time.time()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.started = time.time()

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        self._note(Path(config.runs_dir) / config.study)
        metrics = getattr(job_return, "_return_value", None)
        if not isinstance(metrics, dict) or metrics.get("status") != "ok":
            self.failed.add(str(metrics.get("point")) if isinstance(metrics, dict) else f"job {len(self.failed)}")

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._close(Path(config.runs_dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        for path in Path(config.runs_dir).glob("*/*/metrics.json"):
            if path.stat().st_mtime >= self.started:
                self._note(path.parent.parent)
                if _status(path) != "ok":
                    self.failed.add(path.parent.name)
        self._close(Path(config.runs_dir))

    def _note(self, study: Path) -> None:
        if study not in self.studies:
            self.studies.append(study)

    def _close(self, runs_dir: Path) -> None:
        try:
            for study in self.studies:
                if study.is_dir():
                    finish(study)
        finally:
            if self.failed:
                n = len(self.failed)
                log.error("%d point%s failed; see the table and each point's log.txt", n, "" if n == 1 else "s")
                sys.exit(1)


def _status(path: Path) -> str:
    try:
        return json.loads(path.read_text()).get("status", "")
    except (OSError, ValueError):
        return "damaged"


def finish(study: Path) -> None:
    """Writes a study's CSV and page and prints its table and their paths."""
    from qexp.report.dashboard import write_dashboard
    from qexp.report.results import collect, write_results
    from qexp.report.table import closing_table

    csv = write_results(study)
    page = write_dashboard(study)
    print()
    print(closing_table(collect(study)))
    print(f"\n  table  {csv}\n  page   {page}")
