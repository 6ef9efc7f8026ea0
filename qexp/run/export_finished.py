"""What is made of a finished run afterwards: `python run.py export=verify weights=<run folder>`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qexp.data.contract import DataSet
from qexp.errors import QexpError, near
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.results.run_folder import Record
from qexp.run import exporters, integer_proof, pixels, saved_network
from qexp.run.datasets import load_data
from qexp.run.experiment import Experiment
from qexp.run.settings import Integers, Settings

log = logging.getLogger(__name__)
EXPORTS = ("verify", *exporters.FORMS)
IMAGES = 1000  # a proof is tried on, where no number is given


def again(settings: Settings) -> dict[str, Any]:
    """Returns the metrics of a finished run after what `export` asks for; its folder is where everything is read and written.

    The network is loaded from the folder and nothing is evaluated again. A proof on fewer images than the recorded one does not take its
    place, unless it finds something else.

    Args:
        settings: `export`, `weights` (the run's folder), `verify` (how many images; by default 1,000).
    """
    form = settings.integers.export
    try:
        record, own = _finished(settings)
        with record.locked(record.folder.name):
            metrics = _added(own, load_data(own.data.module), record)
    except Exception as error:
        return _failed(f"export={form}", error)
    return metrics


def proven(settings: Settings, data: DataSet, record: Record) -> dict[str, Any]:
    """Returns the metrics of a finished point after the proof that `verify` asks for; where that fails, the record stays as it is."""
    try:
        return _added(settings, data, record)
    except Exception as error:
        failure = _failed(f"verify={settings.integers.verify}", error)
        return {"study": settings.study, "point": record.folder.name} | failure


def _added(settings: Settings, data: DataSet, record: Record) -> dict[str, Any]:
    """Returns the record of a finished run with what a proof or an export of its network adds, and writes it."""
    model, data = saved_network.load(record.folder), pixels.of(settings, data)
    example = data.example()
    needs_images = settings.integers.export in exporters.OF_NETWORK
    images = data.calibration_batches(settings.n_calibrate, settings.data.calibration_batch, settings.seed)
    context = PassContext(facts(model, example), images if needs_images else [example], {}, folder=record.folder)
    recorded = record.finished() or {}
    metrics = recorded | integer_proof.prove(Experiment(settings, data, record, model, context), recorded)
    record.request = recorded.get("request", "")
    record.metrics(metrics)
    return metrics


def _failed(asked: str, error: Exception) -> dict[str, Any]:
    """Logs what went wrong after a finished run, whose own record stays: a mistake of the user's in a line, a bug with its traceback."""
    log.error(
        "%s failed: %s",
        asked,
        str(error) or type(error).__name__,
        exc_info=None if isinstance(error, QexpError) else error,
    )
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _finished(settings: Settings) -> tuple[Record, Settings]:
    """Returns the record of the run that `weights` names and its settings, with what is asked for now."""
    form = settings.integers.export
    if form not in EXPORTS:
        raise QexpError(f"export={form}{near(str(form), EXPORTS)} is not allowed; use {', '.join(EXPORTS)}")
    folder = Path(str(settings.weights))
    if settings.weights is None or not (folder / "config.yaml").is_file():
        raise QexpError(f"export={form} needs weights=<folder of a finished run>, got {settings.weights}")
    record = Record(folder)
    if record.finished() is None:
        raise QexpError(
            f"{folder}: this run is not finished (its metrics.json does not say ok); run it to its end first"
        )
    if form in exporters.NEEDS:  # checked before the network is loaded
        exporters.NEEDS[form]()
    own = Settings.of({**settings.resolved, **yaml.safe_load((folder / "config.yaml").read_text())})
    asked = Integers(own.integers.rounding, settings.integers.verify or IMAGES, settings.integers.accumulator, form)
    trainer = replace(own.trainer, progress=settings.trainer.progress)
    return record, replace(own, integers=asked, trainer=trainer, study=folder.parent.name)
