"""Exports and proofs of a finished run: `python run.py export=verify weights=<run folder>`, or of an entry of the zoo."""

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
from qexp.results import zoo
from qexp.results.run_folder import Record
from qexp.run import exporters, integer_proof, pixels, saved_network, zoo_unpack
from qexp.run.datasets import load_data
from qexp.run.experiment import Experiment
from qexp.run.settings import Settings

log = logging.getLogger(__name__)
EXPORTS = ("verify", *exporters.FORMS)
IMAGES = 1000  # of a proof, where `verify` gives no number


def again(settings: Settings) -> dict[str, Any]:
    """Returns the metrics of a finished run after the export or proof that `export` names; reads and writes in the run's folder.

    The network is loaded from the folder and is not evaluated again. A proof on fewer images than the recorded one does not replace
    it, unless its result differs.

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
    """Returns the metrics of a finished point after a proof on `verify` images; a failure leaves the record unchanged."""
    try:
        return _added(settings, data, record)
    except Exception as error:
        failure = _failed(f"verify={settings.integers.verify}", error)
        return {"study": settings.study, "point": record.folder.name} | failure


def _added(settings: Settings, data: DataSet, record: Record) -> dict[str, Any]:
    """Returns and writes the record of a finished run, with the results of a proof or an export of its network."""
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
    """Logs the failure of a proof or an export: a user's mistake in one line, a bug with its traceback. The record stays."""
    log.error(
        "%s failed: %s",
        asked,
        str(error) or type(error).__name__,
        exc_info=None if isinstance(error, QexpError) else error,
    )
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _finished(settings: Settings) -> tuple[Record, Settings]:
    """Returns the record and the settings of the run that `weights` names, with the present `export` and `verify`."""
    form = settings.integers.export
    if form not in EXPORTS:
        raise QexpError(f"export={form}{near(str(form), EXPORTS)} is not allowed; use {', '.join(EXPORTS)}")
    in_zoo = zoo.name_of(settings.weights) is not None
    folder = zoo_unpack.unpack(str(settings.weights), settings.runs_dir) if in_zoo else Path(str(settings.weights))
    if settings.weights is None or not (folder / "config.yaml").is_file():
        raise QexpError(
            f"export={form} needs weights=<folder of a finished run>, got {settings.weights}; "
            "weights=zoo:NAME names one of the zoo"
        )
    record = Record(folder)
    if record.finished() is None:
        raise QexpError(
            f"{folder}: this run is not finished (the status in its metrics.json is not ok); run it to its end first"
        )
    if form in exporters.NEEDS:  # checked before the network is loaded
        exporters.NEEDS[form]()
    own = Settings.of({**settings.resolved, **yaml.safe_load((folder / "config.yaml").read_text())})
    images, widths = settings.integers.verify or IMAGES, settings.integers.accumulator
    asked = replace(own.integers, verify=images, accumulator=widths, export=form)
    trainer = replace(own.trainer, progress=settings.trainer.progress)
    return record, replace(own, integers=asked, trainer=trainer, study=folder.parent.name)
