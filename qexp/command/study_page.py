"""The Hydra callback that ends a run or a sweep: the table, the CSV and the page of each study it wrote to."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qexp.command.sweeps import points_of
from qexp.errors import QexpError
from qexp.results import receipts
from qexp.results.receipts import Receipt
from qexp.results.remaining import Remaining

log = logging.getLogger(__name__)


class StudyPage(Callback):
    """Rebuilds `results.csv` and `dashboard.html` when a run or a sweep ends, prints the table, and exits non-zero if a point failed.

    After each point of a sweep a line says how many are done and how long the rest takes. Points may run in other processes and on other
    machines: there this callback leaves a receipt of each under the sweep's own folder (`hydra.sweep.dir`), from which the process that
    started the sweep prints those lines, and at its end knows which studies it wrote to.
    """

    running: ClassVar[StudyPage | None] = None  # in the process that was started

    def __init__(self) -> None:
        self.studies: list[Path] = []
        self.failed: set[str] = set()
        self.remaining: Remaining | None = None
        self.watch: receipts.Watch | None = None
        self.receipts: Path | None = None
        self.exports = False
        self.marked: set[str] = set()  # the point of a single run, among those of its study

    def __getstate__(self) -> dict[str, Any]:
        """Returns what goes along into other processes, which count no points."""
        return self.__dict__ | {"remaining": None, "watch": None}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        StudyPage.running = self
        _forget_mistakes(self._study(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        StudyPage.running, self.receipts = self, _receipts(config)
        _forget_mistakes(self._study(config))
        try:
            total = points_of(config)
        except HydraException:  # a mistake in what was asked, which the sweeper is about to name
            return
        if str(OmegaConf.select(config, "hydra.launcher._target_")).endswith("BasicLauncher"):
            self.remaining = Remaining(total)  # the points run here, one after the other
        else:
            self.watch = receipts.Watch(_receipts(config), Remaining(total))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        metrics, job = getattr(job_return, "_return_value", None), config.hydra.job.get("num")
        if isinstance(metrics, Exception):  # Hydra would raise it after this callback has ended the process
            log.error(
                "%s: %s", type(metrics).__name__, metrics, exc_info=None if isinstance(metrics, QexpError) else metrics
            )
        study = self._study(config)
        receipt = Receipt.of(study, job, metrics if isinstance(metrics, dict) else {})
        self._note(receipt)
        if job is None and isinstance(metrics, dict) and metrics.get("point"):
            self.marked.add(metrics["point"])
        if self.remaining is not None:
            print(self.remaining.line(), flush=True)  # the result is in the point's own last line
        if job is not None:  # a sweep's
            try:
                receipts.leave(_receipts(config), job, receipt)
            except OSError as error:  # a full disk; where the point ran in this process nothing is lost
                log.warning("job %s leaves no receipt: %s", job, error)

    def _study(self, config: DictConfig) -> Path:
        """Returns the study that a job wrote to: an export's is that of the run it is made of."""
        if config.get("export") is None:
            inside = not {"..", "."} & set(str(config.study).split("/")) and not str(config.study).startswith("/")
            return Path(config.runs_dir) / (config.study if inside else "?")  # a name that the run itself refuses
        self.exports = True
        return Path(str(config.weights)).parent

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        for study in self.studies:  # its error is the last line on the screen
            _forget_mistakes(study)
        self._close()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.close()
        for job, receipt in receipts.found(_receipts(config)).items():
            if receipt is not None:
                self._note(receipt)
            else:
                log.warning("the receipt of job %s cannot be read", job)
                self.failed.add(f"job {job}")
        shutil.rmtree(_receipts(config), ignore_errors=True)
        self._close()

    @classmethod
    def interrupted(cls) -> int:
        """Writes the tables and pages of what is done after Ctrl-C, says how to go on, and returns the exit status."""
        page, done = cls.running, ""
        if page is not None:
            if page.watch is not None:
                page.watch.close()
                for receipt in receipts.found(page.watch.folder).values():
                    if receipt is not None:
                        page._note(receipt)
            if page.receipts is not None:  # or the next sweep of that folder would count them as its own
                shutil.rmtree(page.receipts, ignore_errors=True)
            counted = page.remaining or (page.watch and page.watch.remaining)
            if counted:
                done = f" after {counted.done}{f' of {counted.total}' if counted.total else ''} points"
            page._write()
        print(
            f"\ninterrupted{done}: the same command goes on where this one stopped, finished points are not run again",
            file=sys.stderr,
        )
        return 130  # as a shell says of Ctrl-C

    def _note(self, receipt: Receipt) -> None:
        if Path(receipt.study) not in self.studies:
            self.studies.append(Path(receipt.study))
        if receipt.status != "ok":
            self.failed.add(receipt.name)

    def _close(self) -> None:
        broken = self._write()
        if self.failed:
            n = len(self.failed)
            what = "export" if self.exports else "point"
            where = (
                "see above; the run's own record stays" if self.exports else "see the table and each point's log.txt"
            )
            log.error("%d %s%s failed; %s", n, what, "" if n == 1 else "s", where)
        if self.failed or broken:
            sys.exit(1)

    def _write(self) -> bool:
        """Writes the studies' tables and pages; returns whether one could not be written."""
        from qexp.report.study import finish  # here, so that --help and --cfg answer at once

        broken = False
        for study in self.studies:
            try:
                # An export may name a folder that holds no runs.
                if study.is_dir() and any(study.glob("*/metrics.json")):
                    finish(study, self.marked)
            except (OSError, QexpError) as error:  # a full disk; a study whose every point could not be written
                log.error("%s: the table or the page could not be written: %s", study, error)
                broken = True
        return broken


def _forget_mistakes(study: Path) -> None:
    """Removes points that asked for what cannot be; those of a sweep are shown at its end, and are gone with the next command."""
    from qexp.report.forget import forget, mistakes

    try:
        if study.is_dir() and (found := mistakes(study)):
            forget(study, found)
    except (OSError, QexpError) as error:  # read-only, or another process is at it
        log.debug("%s: %s", study, error)


def _receipts(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir) / "receipts"
