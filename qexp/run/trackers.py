"""Trackers: Lightning's loggers, to which a point sends its settings, a handful of scalars, its tables and pages.

A tracker changes no result: it gets no part in names of points or of float networks, sees no tensor, and a tracker that fails (a server
that is gone) is left out with a warning.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch

from qexp.errors import QexpError
from qexp.run.naming import asked, title
from qexp.run.settings import Settings
from qexp.system import ranks
from qexp.system.objects import make

log = logging.getLogger(__name__)
PARENTS = "QEXP_PARENT_RUNS"  # of a sweep, for its points in other processes too: JSON, run id by tracker
PLACES = ("folder", "runs_dir", "study", "point", "title", "parent")  # what a tracker's file may name in braces
SCALARS = (
    *("value", "value_float", "drop", "ci_low", "ci_high", "mean_wbit", "mean_abit", "weight_bytes", "bops"),
    *("worst_sqnr", "seconds_calibrate", "seconds_search", "seconds_train", "seconds_evaluate", "value_integer"),
)
KEPT = ("layers.csv", "metrics.json", "config.yaml")  # of a point's folder, for trackers that keep files


@dataclass
class Trackers:
    """The trackers of a point or of a sweep.

    Attributes:
        loggers: Lightning's loggers, by name of the choice.
    """

    loggers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, folder: Path) -> Trackers:
        """Returns the trackers of a point, told what it is; none in processes that only share its work."""
        if not settings.loggers or ranks.rank():
            return cls()
        made = cls.made(settings.loggers, folder, settings.runs_dir, settings.study, title(settings))
        about = {k: v for k, v in asked(settings).items() if v is not None}
        made._each("log_hyperparams", lambda logger: logger.log_hyperparams(about))
        return made

    @classmethod
    def made(cls, specs: Mapping[str, Any], folder: Path, runs_dir: Path, study: str, words: str) -> Trackers:
        """Returns the trackers of specifications; the random numbers that making them draws are not missed by the run.

        Raises:
            QexpError: A tracker cannot be made.
        """
        runs_dir.mkdir(parents=True, exist_ok=True)  # a tracker may keep its data base there
        parents = json.loads(os.environ.get(PARENTS, "{}"))
        found = {}
        with _same_random_numbers():
            for name, spec in specs.items():
                places = {
                    "folder": str(folder),
                    "runs_dir": str(runs_dir),
                    "study": study,
                    "point": folder.name,
                    "title": words,
                }
                placed = _placed(spec, {**places, "parent": parents.get(name)}, f"logger.{name}")
                found[name] = make(placed, where=f"logger.{name}")
        return cls(found)

    def log(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        """Sends scalars; those that are no finite numbers are left out."""
        known = {k: float(v) for k, v in scalars.items() if isinstance(v, int | float) and np.isfinite(v)}
        self._each("log_metrics", lambda logger: logger.log_metrics(known, step))

    def finish(self, metrics: Mapping[str, Any], folder: Path, files: tuple[str, ...] = KEPT) -> None:
        """Sends the results of a finished point, or those that a failed one has, and its files; closes the trackers."""
        self.log({name: metrics.get(name) for name in SCALARS})
        status = "success" if metrics.get("status", "ok") == "ok" else "failed"
        for name in files:
            if (folder / name).is_file():
                self._each("keep", lambda logger, path=folder / name: _keep(logger, path))
        self._each("finalize", lambda logger: logger.finalize(status))
        self._each("close", _close)
        self.loggers = {}

    def ids(self) -> dict[str, str]:
        """Returns the run of each tracker that gives its runs ids."""
        found: dict[str, str] = {}
        self._each(
            "run_id", lambda logger: found.update({id(logger): logger.run_id}) if hasattr(logger, "run_id") else None
        )
        return {name: found[id(logger)] for name, logger in self.loggers.items() if found.get(id(logger))}

    def _each(self, what: str, act: Callable[[Any], Any]) -> None:
        """Acts on each tracker; one that raises is left out from then on."""
        for name, logger in list(self.loggers.items()):
            try:
                with _same_random_numbers():
                    act(logger)
            except Exception as error:  # whatever a foreign service raises: the run goes on
                log.warning(
                    "logger.%s: %s raises %s: %s; the run goes on without it", name, what, type(error).__name__, error
                )
                del self.loggers[name]


def parent_of(specs: Mapping[str, Any], runs_dir: Path, study: str) -> Trackers:
    """Returns the parent runs of a sweep, of those trackers whose file names `{parent}`; points find them in the environment."""
    asked_for = {name: spec for name, spec in specs.items() if "{parent}" in json.dumps(spec, default=str)}
    made = Trackers.made(asked_for, runs_dir / study, runs_dir, study, f"sweep {study}")
    os.environ[PARENTS] = json.dumps(made.ids())
    return made


def _placed(spec: Any, places: Mapping[str, str | None], where: str) -> Any:
    """Returns a specification with the words in braces filled in; an entry that names a parent run is left out where there is none."""
    if isinstance(spec, Mapping):
        filled = {key: _placed(value, places, f"{where}.{key}") for key, value in spec.items()}
        return {key: value for key, value in filled.items() if value is not _Missing}
    if not isinstance(spec, str) or "{" not in spec:
        return spec
    try:
        names = {name for _, name, _, _ in Formatter().parse(spec) if name is not None}
    except ValueError:
        names = {spec}
    if unknown := names - set(PLACES):
        raise QexpError(
            f"{where}={spec}: {min(unknown)!r} is no place; use {', '.join(f'{{{name}}}' for name in PLACES)}"
        )
    return _Missing if any(places[name] is None for name in names) else spec.format_map(places)


class _Missing:
    """Stands for an entry that is left out."""


def _keep(logger: Any, path: Path) -> None:
    """Gives a file to a tracker that keeps files: MLflow's client, a run of Weights & Biases."""
    experiment, run_id = logger.experiment, getattr(logger, "run_id", None)
    if run_id is not None and hasattr(experiment, "log_artifact"):
        experiment.log_artifact(run_id, str(path))
    elif hasattr(experiment, "save") and hasattr(experiment, "log_artifact"):
        experiment.save(str(path), base_path=str(path.parent), policy="now")


def _close(logger: Any) -> None:
    """Ends a run of Weights & Biases: the next point of a sweep in this process is another run."""
    if hasattr(logger.experiment, "finish"):
        logger.experiment.finish()


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restores the random numbers of Python, NumPy and torch at the end: services draw names of their runs from them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
