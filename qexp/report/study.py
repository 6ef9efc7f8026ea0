"""The Hydra callback that ends a run or a sweep: the table, the CSV and the page of each study it wrote to."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qexp.errors import QexpError
from qexp.report.remaining import Remaining, points_of

log = logging.getLogger(__name__)


class StudyPage(Callback):
    """Rebuilds `results.csv` and `dashboard.html` when a run or a sweep ends, prints the table, and exits non-zero if a point failed.

    Points may run in other processes and on other machines: there this callback leaves a receipt of each under the sweep's own folder
    (`hydra.sweep.dir`), which the process that started the sweep reads at its end.
    """

    def __init__(self) -> None:
        self.studies: list[Path] = []
        self.failed: set[str] = set()
        self.remaining: Remaining | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            total = points_of(config)
        except HydraException:  # a mistake in what was asked, which the sweeper is about to name
            return
        self.remaining = Remaining(total) if total else None

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        metrics = getattr(job_return, "_return_value", None)
        metrics = metrics if isinstance(metrics, dict) else {}
        job = config.hydra.job.get("num")
        name = f"{config.study}/{metrics.get('point') or f'job {job}'}"
        self._note(str(Path(config.runs_dir) / config.study), name, metrics.get("status") == "ok")
        if self.remaining is not None:  # points that other processes run are counted by none of them
            log.info("%s", self.remaining.line())
        if job is not None:  # a sweep's
            try:
                folder = _receipts(config)
                folder.mkdir(parents=True, exist_ok=True)
                study, status = str(Path(config.runs_dir) / config.study), metrics.get("status", "failed")
                (folder / f"{job}.json").write_text(json.dumps({"study": study, "name": name, "status": status}))
            except OSError as error:  # a full disk; where the point ran in this process nothing is lost
                log.warning("job %s leaves no receipt: %s", job, error)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._close()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        for path in sorted(_receipts(config).glob("*.json")):
            try:
                receipt = json.loads(path.read_text())
                self._note(receipt["study"], receipt["name"], receipt["status"] == "ok")
            except (OSError, ValueError) as error:
                log.warning("%s: %s", path, error)
                self.failed.add(path.stem)
        shutil.rmtree(_receipts(config), ignore_errors=True)
        self._close()

    def _note(self, study: str, point: str, succeeded: bool) -> None:
        if Path(study) not in self.studies:
            self.studies.append(Path(study))
        if not succeeded:
            self.failed.add(point)

    def _close(self) -> None:
        broken = False
        for study in self.studies:
            try:
                if study.is_dir():
                    finish(study)
            except (OSError, QexpError) as error:  # a full disk; a study whose every point could not be written
                log.error("%s: the table or the page could not be written: %s", study, error)
                broken = True
        if self.failed:
            n = len(self.failed)
            log.error("%d point%s failed; see the table and each point's log.txt", n, "" if n == 1 else "s")
        if self.failed or broken:
            sys.exit(1)


def _receipts(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir) / "receipts"


def finish(study: Path) -> None:
    """Writes a study's CSV and page and prints its table and their paths."""
    from qexp.report.dashboard import write_dashboard
    from qexp.report.results import collect, write_results
    from qexp.report.runfolder import read_correct
    from qexp.report.table import closing_table

    csv = write_results(study)
    page = write_dashboard(study)
    print()
    points = collect(study)
    correct = {p: hits for p in points["point"] if (hits := read_correct(study / p)) is not None}
    print(closing_table(points, correct=correct))
    print(f"\n  table  {csv}\n  page   {page}")
