"""What is made of a finished run afterwards: `python run.py export=verify weights=<run folder>`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from qexp.data.contract import DataSet
from qexp.errors import QexpError, near
from qexp.results.run_folder import Record
from qexp.run import exporters
from qexp.run.datasets import load_data
from qexp.run.experiment import Experiment
from qexp.run.settings import Settings

log = logging.getLogger(__name__)
EXPORTS = ("verify", *exporters.FORMS)
IMAGES = 1000  # a proof is tried on, where nobody says how many
Compute = Callable[[Settings, DataSet, Record], Experiment]


def again(settings: Settings, experiment: Compute) -> dict[str, Any]:
    """Returns the metrics of a finished run after what `export` asks for; its folder is where everything is read and written.

    The run's own configuration is taken through the same steps: statistics come from the cache, a training from its last checkpoint.
    The run is evaluated again, and a score that is not the recorded one is said: then these are not the files of that run.

    Args:
        settings: `export`, `weights` (the run's folder), `verify` (how many images; by default 1,000). A proof on fewer images than the
            recorded one does not take its place, unless it finds something else.
        experiment: What computes a point.
    """
    try:
        record, own = _finished(settings)
        recorded = record.finished()
        data = load_data(own.data.module)
        with record.locked(record.folder.name):
            metrics = experiment(own, data, record).metrics
    except QexpError as error:  # the run's own record stays
        log.error("export=%s failed: %s", settings.integers.export, error)
        return {"status": "failed", "error": str(error)}
    if metrics["value"] != recorded["value"]:
        log.warning(
            "%s: evaluated again it has %.4f, recorded was %.4f: weights, images or the code have changed since",
            record.folder,
            metrics["value"],
            recorded["value"],
        )
    from qexp.report.study import finish

    finish(record.folder.parent)
    return metrics


def _finished(settings: Settings) -> tuple[Record, Settings]:
    """Returns the record of the run that `weights` names and its settings, with what is asked for now."""
    form = settings.integers.export
    if form not in EXPORTS:
        raise QexpError(f"export={form}{near(str(form), EXPORTS)} is not allowed; use {', '.join(EXPORTS)}")
    folder = Path(str(settings.weights))
    if settings.weights is None or not (folder / "config.yaml").is_file():
        raise QexpError(f"export={form} needs weights=<folder of a finished run>, got {settings.weights}")
    record = Record(folder)
    finished = record.finished()
    if finished is None:
        raise QexpError(
            f"{folder}: this run is not finished (its metrics.json does not say ok); run it to its end first"
        )
    if form in exporters.NEEDS:  # said before the run is evaluated again
        exporters.NEEDS[form]()
    record.request = finished.get("request", "")
    own = {**settings.resolved, **yaml.safe_load((folder / "config.yaml").read_text())}  # keys that later versions have
    own |= {
        "verify": settings.integers.verify or IMAGES,
        "accumulator": list(settings.integers.accumulator),
        "export": form,
    }
    own |= {"runs_dir": str(folder.parent.parent), "study": folder.parent.name, "force": False}
    own["trainer"] = {**own["trainer"], "enable_progress_bar": settings.trainer.progress}
    return record, Settings.of(own)
