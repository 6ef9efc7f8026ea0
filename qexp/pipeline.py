"""One experiment from configuration to record: the only place that orders the steps."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule
from torch import nn

from qexp import devices, export, floats, outcome, proof, stages, teachers, training
from qexp.calibration.calibrate import Calibration, calibrate, fit
from qexp.callbacks.kernels import load_kernels
from qexp.config import settle_training
from qexp.cost import params
from qexp.datasets import load_data
from qexp.errors import QexpError
from qexp.graph import Facts, facts
from qexp.layers.swap import check_all_ran
from qexp.passes.base import Moment, Pass
from qexp.passes.fold_bn import Normal, fold_bn
from qexp.recipe import Plan, Recipe, apply, resolve
from qexp.recipe.bits import FLOAT
from qexp.record import Record, passes_of, peak_mb, point_hash, trains
from qexp.search.setting import Setting

log = logging.getLogger(__name__)
# images a calibration batch where the data set names none, as the averaged and moving-average ranges see them
CALIBRATION_BATCH = 32


def run(cfg: DictConfig) -> dict[str, Any]:
    """Runs one point and returns its metrics; a finished one is not run again, a failed one is recorded and returned.

    Args:
        cfg: The composed configuration.

    Returns:
        The columns of `results.csv` for this point, `status` (`ok` or `failed`) among them.
    """
    if cfg.export is not None:
        return export.again(cfg, experiment)
    settle_training(cfg)
    study, request = Path(cfg.runs_dir) / cfg.study, point_hash(cfg, {})
    record = Record(study / f"failed-{request}", request)  # until the contents that name the point are known
    try:
        data = load_data(cfg.dataset.data)
        contents = {**floats.contents(cfg), "data": data.fingerprint()}
        record = Record(study / point_hash(cfg, contents), request)
        with record.locked(outcome.title(cfg)):
            finished = record.finished()
            if finished is not None and not cfg.force:
                log.info("%s: finished earlier, %s", outcome.title(cfg), record.folder)
                return finished
            try:
                record.open(cfg)
                if cfg.force:
                    record.start_over()
                return experiment(cfg, data, record)
            except Exception as error:  # one point's failure is recorded; a sweep goes on
                return failed(cfg, record, error)
            except KeyboardInterrupt:
                log.warning("%s: interrupted", outcome.title(cfg))
                raise
            finally:
                record.close()
    except Exception as error:
        return failed(cfg, record, error)


def failed(cfg: DictConfig, record: Record, error: Exception) -> dict[str, Any]:
    """Records a failure and returns its row; a mistake of the user's is one line, a bug its traceback."""
    log.error("%s failed: %s", outcome.title(cfg), error, exc_info=None if isinstance(error, QexpError) else error)
    return record.failed(cfg, error)


def experiment(cfg: DictConfig, data: LightningDataModule, record: Record) -> dict[str, Any]:
    """Returns the metrics of one point; its folder holds everything else."""
    seconds: dict[str, float] = {}
    training.check_trainer(cfg)
    kernels = load_kernels(cfg.kernels)
    training.seed(cfg.seed)
    check_input(cfg, data.example())
    log.info("%s -> %s", outcome.title(cfg), record.folder)

    scratch = cfg.schedule.name == "qat_scratch"
    model = floats.build(cfg) if scratch else floats.float_model(cfg, data)
    float_score = None if scratch else floats.reference(cfg, model, data, record.folder)
    distill = teachers.distillation(cfg, data, model, is_float=not scratch) if trains(cfg) else None
    images = calibration_images(cfg, data)
    size = params(model)
    structure, folded = fold(cfg, model, data.example())
    passes, moment = load_passes(cfg), moment_of(cfg, structure, folded, images, record.folder)
    for edit in passes:
        edit.on_float(model, moment)
    structure = moment.facts
    plan = attach(cfg, model, structure)
    stages.check(cfg.schedule, plan, passes)
    with _timed(seconds, "calibrate"):
        seen = find_ranges(cfg, model, moment, passes)
        check_all_ran(model, data.example())
    if cfg.search is not None:
        with _timed(seconds, "search"):
            plan = search(cfg, model, plan, moment, passes, data, record.folder)
    with _timed(seconds, "calibrate"):
        for edit in passes:
            edit.on_fitted(model, moment)

    if trains(cfg):
        trained = stages.train(
            model, data, cfg, plan, structure, images, seen, record.folder, outcome.title(cfg), distill
        )
        seconds["train"] = sum(stage["seconds"] for stage in trained)
        moment.findings["train_value"] = 100 * trained[-1]["train"]
        if len(trained) > 1:
            moment.findings["stages"] = trained
        for edit in passes:
            edit.on_trained(model, moment)
    with proof.rounding(cfg, model, data):
        score, seconds["evaluate"] = training.evaluate(model, data, cfg, outcome.title(cfg), record.folder)

    metrics = outcome.metrics(cfg, model, size, structure, plan, score, float_score, seconds)
    metrics |= {
        "kernels": kernels,
        "point": record.folder.name,
        "peak_mb": peak_mb(),
        "n_calibrate": cfg.n_calibrate and sum(map(len, images)),
        **data.notes(),
        **moment.findings,
        **proof.prove(cfg, model, data, record, metrics["value"], images),
    }
    training.task(cfg, model).leave(record.folder, score, float_score, data)
    outcome.write(record, model, plan, structure, seen, images[0], metrics, score)
    log.info("%s: %s", outcome.title(cfg), outcome.line(metrics))
    return metrics


def calibration_images(cfg: DictConfig, data: LightningDataModule) -> list[torch.Tensor]:
    """Returns the batches that ranges are found on; with `n_calibrate=0`, where nothing is quantized, one image to trace with."""
    widths = {str(cfg.layer_wbit), str(cfg.layer_abit), str(cfg.ends_bit or FLOAT)}
    if cfg.n_calibrate == 0 and (cfg.schedule.name == "float" or widths == {str(FLOAT)}):
        return [data.example()]
    size = cfg.dataset.get("calibration_batch", CALIBRATION_BATCH)
    return data.calibration_batches(cfg.n_calibrate, size, cfg.seed)


def fold(cfg: DictConfig, model: nn.Module, example: torch.Tensor) -> tuple[Facts, dict[str, Normal]]:
    """Folds batch norms where the run asks for it, in place; returns the facts of the network that is left, and what was folded."""
    if cfg.bn not in ("fold", "keep", "freeze"):
        raise QexpError(f"bn={cfg.bn!r}; allowed are fold, keep, freeze")
    structure = facts(model, example)
    if cfg.bn != "fold" or not (structure.bn_of or structure.trace_error):
        return structure, {}
    folded = fold_bn(model, structure)
    log.info("batch norm folded into %d convolutions", len(folded))
    return facts(model, example), folded


def moment_of(
    cfg: DictConfig, structure: Facts, folded: dict[str, Normal], images: list[torch.Tensor], folder: Path
) -> Moment:
    """Returns what passes may look at and use."""
    bar = bool(cfg.trainer.get("enable_progress_bar", True))
    return Moment(
        structure, images, {}, folded=folded, folder=folder, seed=cfg.seed, device=devices.device(cfg), progress=bar
    )


def load_passes(cfg: DictConfig) -> list[Pass]:
    """Returns the recipe's passes, then those of `passes=`, each in the order written; a name in both has the recipe's place."""
    if cfg.schedule.name == "float":
        return []
    return [instantiate(node, _convert_="all") for node in passes_of(cfg).values()]


def attach(cfg: DictConfig, model: nn.Module, structure: Facts) -> Plan:
    """Attaches the quantizers the recipe asks for, in place; returns the plan, which it prints."""
    plan = resolve(model, structure, recipe(cfg))
    told = outcome.plan_line if _is_sweep() else outcome.plan_summary  # a sweep's plans are in each point's layers.csv
    log.info("%s", told(plan, structure))
    apply(model, plan, structure)
    return plan


def recipe(cfg: DictConfig) -> Recipe:
    """Returns the recipe a configuration asks for, as plain values."""
    if cfg.schedule.name == "float":
        return Recipe(sites={}, wbit=32, abit=32)
    quant = OmegaConf.to_container(cfg.quant, resolve=True)

    def plain(value: Any) -> Any:
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    return Recipe(
        sites={site: quant.get(site) for site in ("input", "weight", "bias", "output", "grad_output", "compute")},
        rules=quant.get("rules") or {},
        wbit=plain(cfg.layer_wbit),
        abit=plain(cfg.layer_abit),
        groups=plain(cfg.model.get("groups")),
        first=plain(cfg.model.get("first")),
        last=plain(cfg.model.get("last")),
        plan=Path(cfg.plan) if cfg.plan else None,
    )


def find_ranges(cfg: DictConfig, model: nn.Module, moment: Moment, passes: list[Pass]) -> Calibration:
    """Fits every quantizer from the statistics of the calibration images; returns the statistics."""

    def before_fit(seen: Calibration) -> None:
        moment.calibration = seen
        for edit in passes:
            edit.on_statistics(model, moment)

    return calibrate(
        model,
        moment.images,
        followed_by_relu=moment.facts.followed_by_relu,
        cache_dir=floats.cache_dir(cfg) / "calibration",
        progress=cfg.trainer.enable_progress_bar,
        before_fit=before_fit,
        device=moment.device,
        processes=devices.processes(cfg),
    )


def search(
    cfg: DictConfig,
    model: nn.Module,
    plan: Plan,
    moment: Moment,
    passes: list[Pass],
    data: LightningDataModule,
    folder: Path,
) -> Plan:
    """Runs the search a configuration names on held-out training images; returns the plan the model then carries."""

    def refit() -> None:
        for edit in passes:
            edit.on_statistics(model, moment)
        fit(model, moment.calibration, moment.facts.followed_by_relu)

    return instantiate(cfg.search, _convert_="all")(
        Setting(
            model,
            plan,
            moment.facts,
            refit,
            data.val_dataloader(),
            folder,
            floats.cache_dir(cfg),
            seed=cfg.seed,
            progress=cfg.trainer.enable_progress_bar,
            findings=moment.findings,
        )
    )


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_input(cfg: DictConfig, example: torch.Tensor) -> None:
    """Raises if the data set's images are not what the network takes."""
    takes = cfg.model.get("input_size")
    if takes is not None and list(example.shape[1:]) != list(takes):
        raise QexpError(
            f"model={cfg.model.name} takes images {list(takes)}, dataset={cfg.dataset.name} has {list(example.shape[1:])}; "
            "choose another dataset or model (channels, height, width must agree)"
        )


class _timed:
    """Adds the seconds of a `with` block to a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start
