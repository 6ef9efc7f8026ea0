"""What is made of a finished run afterwards: `python run.py export=verify weights=<run folder>`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning import LightningDataModule

from qexp import takeaway
from qexp.datasets import load_data
from qexp.errors import QexpError, near
from qexp.record import Record

log = logging.getLogger(__name__)
EXPORTS = ("verify", *takeaway.FORMS)
IMAGES = 1000  # a proof is tried on, where nobody says how many
Experiment = Callable[[DictConfig, Any, Record], dict[str, Any]]


def again(cfg: DictConfig, experiment: Experiment) -> dict[str, Any]:
    """Returns the metrics of a finished run after what `export` asks for; its folder is where everything is read and written.

    The run's own configuration is taken through the same steps: statistics come from the cache, a training from its last checkpoint.
    The run is evaluated again, and a score that is not the recorded one is said: then these are not the files of that run.

    Args:
        cfg: `export`, `weights` (the run's folder), `verify` (how many images; by default 1,000). A proof on fewer images than the
            recorded one does not take its place, unless it finds something else.
        experiment: What computes a point.
    """
    try:
        record, own = _finished(cfg)
        recorded = record.finished()
        data = load_data(own.dataset.data)
        with record.locked(record.folder.name):
            metrics = experiment(own, data, record)
    except Exception as error:
        return _told(f"export={cfg.export}", error)
    if metrics["value"] != recorded["value"]:
        log.warning(
            "%s: evaluated again it has %.4f, recorded was %.4f: weights, images or the code have changed since",
            record.folder,
            metrics["value"],
            recorded["value"],
        )
    return metrics


def proven(cfg: DictConfig, data: LightningDataModule, record: Record, experiment: Experiment) -> dict[str, Any]:
    """Returns the metrics of a finished point after the proof that `verify` asks for; where that fails, the record stays as it is."""
    try:
        return experiment(cfg, data, record)
    except Exception as error:
        return {"study": cfg.study, "point": record.folder.name} | _told(f"verify={cfg.verify}", error)


def _told(asked: str, error: Exception) -> dict[str, Any]:
    """Logs what went wrong after a finished run, whose own record stays: a mistake of the user's in a line, a bug with its traceback."""
    log.error(
        "%s failed: %s",
        asked,
        str(error) or type(error).__name__,
        exc_info=None if isinstance(error, QexpError) else error,
    )
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _finished(cfg: DictConfig) -> tuple[Record, DictConfig]:
    """Returns the record of the run that `weights` names and its configuration, with what is asked for now."""
    if cfg.export not in EXPORTS:
        raise QexpError(f"export={cfg.export!r}{near(str(cfg.export), EXPORTS)}; allowed are {', '.join(EXPORTS)}")
    folder = Path(str(cfg.weights))
    if cfg.weights is None or not (folder / "config.yaml").is_file():
        raise QexpError(f"export={cfg.export} needs weights=<folder of a finished run>, got {cfg.weights}")
    record = Record(folder)
    finished = record.finished()
    if finished is None:
        raise QexpError(
            f"{folder}: this run is not finished (its metrics.json does not say ok); run it to its end first"
        )
    if cfg.export in takeaway.NEEDS:  # said before the run is evaluated again
        takeaway.NEEDS[cfg.export]()
    own = OmegaConf.load(folder / "config.yaml")
    record.request = finished.get("request", "")
    with open_dict(own):
        for key in cfg:  # what later versions of the configuration have
            if key not in own:
                own[key] = cfg[key]
        own.verify, own.accumulator, own.export = cfg.verify or IMAGES, cfg.accumulator, cfg.export
        own.runs_dir, own.study, own.force = str(folder.parent.parent), folder.parent.name, False
        own.trainer.enable_progress_bar = cfg.trainer.enable_progress_bar
    return record, own
