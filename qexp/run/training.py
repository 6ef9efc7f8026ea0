"""Training and evaluation of one network through Lightning, from plain configuration nodes."""

from __future__ import annotations

import logging
import pickle
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import nn

from qexp.callbacks.averaging import AveragedWeights
from qexp.callbacks.divergence import Divergence
from qexp.callbacks.growing import Growing
from qexp.callbacks.history import History
from qexp.callbacks.oscillation import Oscillation
from qexp.callbacks.progress import Progress
from qexp.callbacks.randomness import EpochSeed
from qexp.callbacks.steps import OptimizerSteps
from qexp.data.later import LaterEpochs
from qexp.errors import QexpError
from qexp.layers.quantized import is_quantizer_parameter, latent_decays, quantizers
from qexp.layers.swap import baked_weights
from qexp.network.lean_evaluation import lean
from qexp.run.devices import processes, spread
from qexp.system import ranks
from qexp.tasks.base import Score, Task
from qexp.tasks.classification import Classification
from qexp.tasks.distillation import Distillation
from qexp.tasks.sharpness import SharpnessAware

log = logging.getLogger(__name__)
for _name in (
    "pytorch_lightning",
    "pytorch_lightning.utilities.rank_zero",
):  # which devices there are, and advertisements
    logging.getLogger(_name).setLevel(logging.WARNING)
# Lightning advises more workers for any loader; ours hands out ready-made tensors
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*number of training batches.*is smaller than the logging interval.*")
warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")


def parameter_groups(schedule: DictConfig):
    """Returns a function that splits a network's parameters, each group with its options.

    Weights; weights whose quantizer asks for a decay of its own; scales and clips, with the schedule's `quantizer` options.
    """
    own = dict(schedule.get("quantizer") or {})

    def split(model: nn.Module) -> list[dict[str, Any]]:
        quantizer, decays = is_quantizer_parameter(model), latent_decays(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if id(p) not in quantizer and id(p) not in decays]}]
        for decay in sorted(set(decays.values())):
            groups.append({"params": [p for p in trained if decays.get(id(p)) == decay], "weight_decay": decay})
        learned = [p for p in trained if id(p) in quantizer]
        return [*groups, {"params": learned, **own}] if learned else groups

    return split


def task(
    cfg: DictConfig,
    model: nn.Module,
    schedule: DictConfig | None = None,
    freeze_bn: bool = False,
    distill: Distillation | None = None,
) -> Task:
    """Returns the LightningModule that trains (with a schedule) or only scores (without) the network.

    The data set's `task` names its class and options; a set that names none is one of classes.
    """
    make = instantiate(task_options(cfg), _partial_=True, _convert_="all")
    if schedule is None:
        return make(model=model)
    return make(
        model=model,
        optimizer=instantiate(schedule.optimizer),
        scheduler=instantiate(schedule.scheduler) if schedule.get("scheduler") else None,
        groups=parameter_groups(schedule),
        freeze_bn=freeze_bn,
        **{key: schedule[key] for key in make.func.of_schedule},
        **({"distill": distill} if distill else {}),
        **({"sharpness": found} if (found := sharpness(schedule, make.func)) else {}),
    )


def sharpness(schedule: DictConfig, task_class: type[Task]) -> SharpnessAware | None:
    """Returns what the schedule's `sam` asks for; None where it is off."""
    asked = schedule.get("sam")
    if not asked:
        return None
    if not issubclass(task_class, Classification):
        raise QexpError(
            f"schedule.sam: {task_class.__name__} takes one pass a step; use sam: null, or a task of classes"
        )
    return SharpnessAware(places=weight_places, **OmegaConf.to_container(asked, resolve=True))


def weight_places(model: nn.Module) -> list[nn.Module]:
    """Returns the quantizers of a network's weights, each once."""
    return list({id(q): q for _, site, q in quantizers(model) if site == "weight"}.values())


def task_options(cfg: DictConfig) -> dict[str, Any]:
    """Returns the class and the options of the data set's task, as plain values."""
    if cfg.dataset.get("task"):
        return OmegaConf.to_container(cfg.dataset.task, resolve=True)
    return {"_target_": "qexp.tasks.classification.Classification", "num_classes": cfg.dataset.num_classes}


def make_trainer(
    cfg: DictConfig, phase: str, folder: Path, callbacks: list[Callback] | None = None, **options: Any
) -> Trainer:
    """Returns a Trainer for one phase: the configured callbacks, curves and progress bound to this run's folder and name."""
    # memory of methods advances whatever callbacks are chosen: it is part of what a method computes; and no run goes on with broken scales
    chosen = [
        OptimizerSteps(),
        Divergence(),
        *(instantiate(node) for node in cfg.callbacks.values() if node),
        *(callbacks or []),
    ]
    for callback in chosen:
        if isinstance(callback, Growing):
            callback.path = folder / callback.file
        if isinstance(callback, Progress):
            callback.phase = phase
    if not cfg.trainer.get("enable_progress_bar", True) or ranks.rank():
        chosen = [c for c in chosen if not isinstance(c, Progress)]
    # one device a process; where several work together Lightning finds them as `spread` has started them
    several = {"strategy": cfg.trainer.get("strategy", "ddp"), "plugins": [LightningEnvironment()]}
    return _trainer(
        OmegaConf.to_container(cfg.trainer, resolve=True),
        callbacks=chosen,
        **(several if ranks.world() > 1 else {}),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
        **options,
    )


def _trainer(asked: dict[str, Any], **options: Any) -> Trainer:
    """Returns the Trainer of `cfg.trainer` and what a phase adds.

    Raises:
        QexpError: Lightning does not take an option, or this machine has no such accelerator.
    """
    try:
        return instantiate({**asked, "strategy": "auto", "devices": ranks.world()}, logger=False, **options)
    except InstantiationException as error:
        accelerator = asked.get("accelerator")
        no_gpu = accelerator in ("gpu", "cuda") and not torch.cuda.is_available()
        advice = f"; torch finds no GPU here (trainer.accelerator={accelerator}): use trainer=cpu" if no_gpu else ""
        raise QexpError(f"trainer: {error.__cause__ or error}{advice}") from None


def check_trainer(cfg: DictConfig) -> None:
    """Raises, before any work, if Lightning does not take the trainer's options or this machine does not have its devices."""
    processes(cfg)
    _try_trainer(OmegaConf.to_yaml(cfg.trainer, resolve=True))


@cache
def _try_trainer(asked: str) -> None:
    """Makes a Trainer, of YAML, once a sweep: that takes longer than a small evaluation."""
    _trainer(OmegaConf.to_container(OmegaConf.create(asked)), enable_checkpointing=False)


@dataclass(frozen=True)
class Part:
    """One of several trainings that follow each other in a run.

    Attributes:
        name: Its checkpoints lie in `checkpoints/NAME`; empty for the last.
        epochs: How many it has.
        epochs_before, steps_before: What the parts before it have done: order and augmentation of the images, and the curves, go on there.
    """

    name: str = ""
    epochs: int = 0
    epochs_before: int = 0
    steps_before: int = 0


def fit(
    module: Task,
    data: LightningDataModule,
    cfg: DictConfig,
    schedule: DictConfig,
    phase: str,
    folder: Path,
    part: Part | None = None,
) -> float:
    """Trains, resuming from `checkpoints/last.ckpt` where an interrupted run left one; returns the seconds all of it took.

    `checkpoints/last.ckpt` is written after every epoch, `best.ckpt` where the validation score rises. The network
    ends at its last state. With `trainer.devices` above 1 as many processes share each step's images.
    """
    if processes(cfg) > ranks.world():
        state, module.trained, seconds = spread(cfg, _fit_share, data, module, cfg, schedule, phase, folder, part)
        module.load_state_dict(state)
        return seconds
    part = part or Part(epochs=schedule.epochs)
    checkpoints = folder / "checkpoints" / part.name
    # two, since one alone writes `last` only where it also writes a new `best`
    best = ModelCheckpoint(checkpoints, "best", monitor=module.monitor, mode="max", enable_version_counter=False)
    newest = ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = make_trainer(
        cfg,
        phase,
        folder,
        [EpochSeed(cfg.seed, part.epochs_before), *helpers(schedule), best, newest],
        enable_checkpointing=True,
        max_epochs=part.epochs,
        max_steps=schedule.max_steps,
        gradient_clip_val=schedule.get("gradient_clip"),
    )
    for callback in trainer.callbacks:
        if isinstance(callback, Growing):
            callback.epochs_before, callback.steps_before = part.epochs_before, part.steps_before
        if isinstance(callback, History):
            callback.images = next(iter(data.val_dataloader()))[0]
    last = checkpoints / "last.ckpt"
    if last.exists() and _is_whole(last):
        check_recipe(module, last)
        log.info("%s: resuming from %s", phase, last)
    module.began = time.perf_counter()
    images: dict[str, Any] = {"datamodule": data}
    if part.epochs_before:
        later = LaterEpochs(data.train_dataloader(), part.epochs_before)
        images = {"train_dataloaders": later, "val_dataloaders": data.val_dataloader()}
    with interruptible(trainer):
        trainer.fit(module, **images, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    for callback in trainer.callbacks:
        if isinstance(callback, AveragedWeights):
            callback.take(module)
    seconds = module.seconds()
    # where an earlier process did the last epoch, its scores are those of the checkpoint
    module.trained = {**module.trained, "steps": trainer.global_step, **module.logged(), "seconds": seconds}
    return seconds


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Lets Ctrl-C out as what it is: Lightning makes an exit of it, without a word, and deafens the process to the next one."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt from None
    if trainer.interrupted:
        raise KeyboardInterrupt


def _fit_share(data: LightningDataModule, module: Task, *args: Any) -> tuple[dict[str, Any], dict[str, float], float]:
    """Returns the trained state, on the CPU, what the training came to, and the seconds it took."""
    seconds = fit(module, data, *args)
    return {key: value.cpu() for key, value in module.state_dict().items()}, module.trained, seconds


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read; one that cannot (the machine went down as it was written) is removed, with a warning."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        log.warning(
            "%s is damaged (%s); training starts anew", checkpoint, str(error).splitlines()[0] if str(error) else error
        )
        checkpoint.unlink(missing_ok=True)  # another rank may have found the same
        return False
    return True


def helpers(schedule: DictConfig) -> list[Callback]:
    """Returns what a schedule asks to happen around each optimizer step: weights averaged, oscillating ones counted or held."""
    chosen: list[Callback] = []
    if schedule.get("oscillation"):
        chosen.append(Oscillation(**OmegaConf.to_container(schedule.oscillation, resolve=True)))
    if schedule.get("ema") is not None:
        chosen.append(AveragedWeights(schedule.ema))
    return chosen


def check_recipe(module: nn.Module, checkpoint: Path) -> None:
    """Raises if a checkpoint was made with another network or recipe: other tensors, shapes or code limits."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    own = module.state_dict()
    differ = [
        key for key in {**own, **saved} if key not in own or key not in saved or own[key].shape != saved[key].shape
    ]
    limits = [key for key in own if key.endswith((".qmin", ".qmax")) and key not in differ]
    differ += [key for key in limits if not torch.equal(own[key].cpu(), saved[key])]
    if differ:
        names = ", ".join(key.removeprefix("model.") for key in differ[:4])
        raise QexpError(
            f"{checkpoint}: the recipe differs from the checkpoint's in {len(differ)} tensors: {names}"
            f"{' ...' if len(differ) > 4 else ''}; run the recipe it was made with, or force=true to start anew"
        )


def evaluate(
    model: nn.Module, data: LightningDataModule, cfg: DictConfig, phase: str, folder: Path
) -> tuple[Score, float]:
    """Returns the score on the test samples and the seconds it took."""
    module = task(cfg, model)
    if processes(cfg) > ranks.world() and module.merges:
        return spread(cfg, _evaluate_share, data, model, cfg, phase, folder)
    trainer = make_trainer(cfg, phase, folder, enable_checkpointing=False)
    start = time.perf_counter()
    with baked_weights(model), lean(model), interruptible(trainer):
        trainer.test(module, datamodule=data, verbose=False)
    return module.score(), time.perf_counter() - start


def _evaluate_share(data: LightningDataModule, model: nn.Module, *args: Any) -> tuple[Score, float]:
    return evaluate(model, data, *args)


def seed(value: int) -> None:
    """Seeds Python, NumPy and torch."""
    from pytorch_lightning import seed_everything

    seed_everything(value, workers=True, verbose=False)
