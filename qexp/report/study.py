"""The Hydra callback that ends a run or a sweep: the table, the CSV and the page of its study."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class StudyPage(Callback):
    """Rebuilds `results.csv` and `dashboard.html` when a run or a sweep ends, prints the table, and exits non-zero if a point failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        metrics = getattr(job_return, "_return_value", None)
        if not isinstance(metrics, dict) or metrics.get("status") != "ok":
            self.failed.append(metrics.get("error", "") if isinstance(metrics, dict) else "")

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._close(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._close(config)

    def _close(self, config: DictConfig) -> None:
        study = Path(config.runs_dir) / config.study
        if not study.is_dir():
            return
        finish(study)
        if self.failed:
            log.error(
                "%d point%s failed; see the table and each point's log.txt",
                len(self.failed),
                "" if len(self.failed) == 1 else "s",
            )
            sys.exit(1)


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
