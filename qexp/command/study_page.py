"""The Hydra callback that ends a run or a sweep with the table, the CSV and the page of each study."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qexp.command.chosen import study_of
from qexp.command.sweeps import points_of
from qexp.errors import QexpError
from qexp.results import receipts
from qexp.results.receipts import Receipt
from qexp.results.remaining import Remaining

log = logging.getLogger(__name__)


class StudyPage(Callback):
    """Rebuilds `results.csv` and `dashboard.html` when a run or a sweep ends, prints the table, and exits non-zero if a point failed.

    After each point of a sweep, one line gives the number of finished points and the time left. If points run in other processes or on
    other machines, this callback leaves a receipt of each in the sweep's own folder (`hydra.sweep.dir`). The process that started the
    sweep prints those lines from the receipts, and finds in them which studies the sweep wrote to.
    """

    running: ClassVar[StudyPage | None] = None  # the instance of the process that was started

    def __init__(self) -> None:
        self.studies: list[Path] = []
        self.failed: set[str] = set()
        self.remaining: Remaining | None = None
        self.watch: receipts.Watch | None = None
        self.receipts: Path | None = None
        self.exports = False
        self.tracked: Any = None  # parent runs of a sweep, in trackers that have them
        self.marked: set[str] = set()  # the point of a single run, among those of its study

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for other processes, which do not count points."""
        return self.__dict__ | {"remaining": None, "watch": None, "tracked": None}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        StudyPage.running = self
        _forget_mistakes(self._study(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        StudyPage.running, self.receipts = self, _receipts(config)
        self.tracked = _parent_run(config, self._study(config))
        _forget_mistakes(self._study(config))
        try:
            total = points_of(config)
        except HydraException:  # a mistake in the command line, for which the sweeper raises the error
            return
        if str(OmegaConf.select(config, "hydra.launcher._target_")).endswith("BasicLauncher"):
            self.remaining = Remaining(total)  # the points run in this process, one after the other
        else:
            self.watch = receipts.Watch(_receipts(config), Remaining(total))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        metrics, job = getattr(job_return, "_return_value", None), config.hydra.job.get("num")
        if isinstance(metrics, Exception):  # Hydra raises it only after this callback, which ends the process
            log.error(
                "%s: %s", type(metrics).__name__, metrics, exc_info=None if isinstance(metrics, QexpError) else metrics
            )
        study = self._study(config)
        receipt = Receipt.of(study, job, metrics if isinstance(metrics, dict) else {})
        self._note(receipt)
        if job is None and isinstance(metrics, dict) and metrics.get("point"):
            self.marked.add(metrics["point"])
        if self.remaining is not None:
            print(self.remaining.line(), flush=True)  # the point's own last line gives the result
        if job is not None:  # a job of a sweep
            try:
                receipts.leave(_receipts(config), job, receipt)
            except OSError as error:  # such as a full disk; nothing is lost if the point ran in this process
                log.warning("the receipt of job %s could not be written: %s", job, error)

    def _study(self, config: DictConfig) -> Path:
        """Returns the study that a job wrote to: for an export, the study of the exported run."""
        if config.get("export") is None:
            study = study_of(config, config.hydra.runtime.choices)
            inside = not {"..", "."} & set(study.split("/")) and not study.startswith("/")
            return Path(config.runs_dir) / (study if inside else "?")  # the run itself raises for other names
        self.exports = True
        return Path(str(config.weights)).parent

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        forgotten = [study for study in self.studies if _forget_mistakes(study)]
        if forgotten and self.failed:  # the table holds no row of it, so that its error stays the last but one line
            log.error("1 point failed; see above")
            sys.exit(1)
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
        """Writes the tables and pages of the finished points after Ctrl-C, prints how to continue, and returns the exit status."""
        page, done = cls.running, ""
        if page is not None:
            if page.watch is not None:
                page.watch.close()
                for receipt in receipts.found(page.watch.folder).values():
                    if receipt is not None:
                        page._note(receipt)
            if page.receipts is not None:  # else the next sweep in that folder would count them as its own
                shutil.rmtree(page.receipts, ignore_errors=True)
            counted = page.remaining or (page.watch and page.watch.remaining)
            if counted:
                done = f" after {counted.done}{f' of {counted.total}' if counted.total else ''} points"
            page._write()
        print(
            f"\ninterrupted{done}: run the same command again to continue; finished points are not run again",
            file=sys.stderr,
        )
        return 130  # the shell's exit status for Ctrl-C

    def _note(self, receipt: Receipt) -> None:
        if Path(receipt.study) not in self.studies:
            self.studies.append(Path(receipt.study))
        if receipt.status != "ok":
            self.failed.add(receipt.name)

    def _close(self) -> None:
        broken = self._write()
        if self.tracked is not None:
            self.tracked.finish({}, self.studies[0] if self.studies else Path(), ("results.csv", "dashboard.html"))
        if self.failed:
            n = len(self.failed)
            what = "export" if self.exports else "point"
            where = "see above; the run's own record stays" if self.exports else _where_to_look(self.studies)
            log.error("%d %s%s failed; %s", n, what, "" if n == 1 else "s", where)
        if self.failed or broken:
            sys.exit(1)

    def _write(self) -> bool:
        """Writes the studies' tables and pages; returns whether one could not be written."""
        from qexp.report.study import finish  # imported here, so that --help and --cfg start fast

        broken = False
        for study in self.studies:
            try:
                # An export may name a folder that holds no runs.
                if study.is_dir() and any(study.glob("*/metrics.json")):
                    finish(study, self.marked)
            except (OSError, QexpError) as error:  # a full disk, or a study none of whose points could be written
                log.error("%s: the table or the page could not be written: %s", study, error)
                broken = True
        return broken


def _where_to_look(studies: Sequence[Path]) -> str:
    """Returns where the reason of a failure stands: the files that were written, or else the screen."""
    written = ["the table"] if any((study / "results.csv").is_file() for study in studies) else []
    written += ["each point's log.txt"] if any(any(study.glob("*/log.txt")) for study in studies) else []
    return f"see {' and '.join(written) or 'above'}"


def _forget_mistakes(study: Path) -> bool:
    """Removes points with an impossible request and returns whether there were any.

    A sweep still shows its own at its end, and the next command removes them.
    """
    from qexp.report.forget import forget, mistakes

    try:
        if study.is_dir() and (found := mistakes(study)):
            forget(study, found)
            return True
    except (OSError, QexpError) as error:  # read-only, or locked by another process
        log.debug("%s: %s", study, error)
    return False


def _parent_run(config: DictConfig, study: Path) -> Any:
    """Returns the parent runs of a sweep; None without trackers that have such runs."""
    if not config.get("logger"):
        return None
    from qexp.run.trackers import parent_of  # imported here, so that --help and --cfg start fast

    specs = {name: spec for name, spec in OmegaConf.to_container(config.logger, resolve=True).items() if spec}
    runs_dir = Path(config.runs_dir)
    try:
        return parent_of(specs, runs_dir, study.relative_to(runs_dir).as_posix())
    except QexpError as error:  # each point says the same
        log.warning("%s", error)
        return None


def _receipts(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir) / "receipts"
