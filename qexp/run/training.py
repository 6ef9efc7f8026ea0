"""Training and evaluation of one network through Lightning, from settings."""

from __future__ import annotations

import logging
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import nn

from qexp.callbacks.averaging import AveragedWeights
from qexp.callbacks.csv_callback import CsvCallback
from qexp.callbacks.divergence import Divergence
from qexp.callbacks.history import History
from qexp.callbacks.oscillation import Oscillation
from qexp.callbacks.progress import Progress
from qexp.callbacks.randomness import EpochSeed
from qexp.callbacks.steps import OptimizerSteps
from qexp.callbacks.whole_checkpoints import WholeCheckpoints
from qexp.data.contract import DataSet
from qexp.data.offset_epochs import OffsetEpochs
from qexp.data.single import spare_single_image
from qexp.errors import QexpError
from qexp.layers.quantized import is_quantizer_parameter, latent_decays, quantizers
from qexp.layers.swap import baked_weights
from qexp.network.lean_evaluation import lean
from qexp.network.lean_training import lean_training
from qexp.run.codes import products
from qexp.run.devices import device_name, processes, spread
from qexp.run.settings import Schedule, Settings, TrainerOptions
from qexp.run.settings.trainer import OWN
from qexp.system import ranks
from qexp.system.objects import make
from qexp.tasks.base import Score, Task
from qexp.tasks.classification import Classification
from qexp.tasks.distillation import Distillation
from qexp.tasks.sharpness import SharpnessAware

log = logging.getLogger(__name__)
# Silences Lightning's lists of devices and its advertisements.
for _name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# Lightning advises more workers for any loader; ours yields tensors that are already in memory
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*number of training batches.*is smaller than the logging interval.*")
warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")


def parameter_groups(schedule: Schedule) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """Returns a function that splits a network's parameters into groups, each with its options.

    The groups: weights; weights whose quantizer has a decay of its own; scales and clips, with the schedule's `quantizer` options.
    """
    own = dict(schedule.quantizer)

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
    settings: Settings,
    model: nn.Module,
    schedule: Schedule | None = None,
    freeze_bn: bool = False,
    distill: Distillation | None = None,
) -> Task:
    """Returns the LightningModule that trains (with a schedule) or only scores (without) the network.

    The data set's `task` names its class and options; without a `task`, classification is assumed.
    """
    build = make(settings.data.task, where="dataset.task", as_partial=True)
    if schedule is None:
        return build(model=model)
    return build(
        model=model,
        optimizer=make(schedule.optimizer, where="schedule.optimizer"),
        scheduler=make(schedule.scheduler, where="schedule.scheduler") if schedule.scheduler else None,
        groups=parameter_groups(schedule),
        freeze_bn=freeze_bn,
        **{key: schedule.options[key] for key in build.func.of_schedule},
        **({"distill": distill} if distill else {}),
        **({"sharpness": found} if (found := sharpness(schedule, build.func)) else {}),
    )


def sharpness(schedule: Schedule, task_class: type[Task]) -> SharpnessAware | None:
    """Returns the sharpness-aware step of the schedule's `sam`; None where it is off."""
    if not schedule.sam:
        return None
    if not issubclass(task_class, Classification):
        raise QexpError(
            f"schedule.sam: {task_class.__name__} makes one pass per step; use sam: null, or a classification task"
        )
    return SharpnessAware(places=weight_places, **schedule.sam)


def weight_places(model: nn.Module) -> list[nn.Module]:
    """Returns the quantizers of a network's weights, without repeats."""
    return list({id(q): q for _, site, q in quantizers(model) if site == "weight"}.values())


def make_trainer(
    settings: Settings, phase: str, folder: Path, callbacks: list[Callback] | None = None, **options: Any
) -> Trainer:
    """Returns a Trainer for one phase; callbacks, curves and progress use this run's folder and name."""
    # added to any choice of callbacks: the memory of methods advances, since it is part of the method, and broken scales end the run
    chosen = [
        OptimizerSteps(),
        Divergence(),
        *(make(spec, where=f"callbacks.{name}") for name, spec in settings.callbacks.items()),
        *(callbacks or []),
    ]
    for callback in chosen:
        if isinstance(callback, CsvCallback):
            callback.path = folder / callback.file
        if isinstance(callback, Progress):
            callback.phase = phase
    if not settings.trainer.progress or ranks.rank():
        chosen = [c for c in chosen if not isinstance(c, Progress)]
    # one device per process; Lightning finds the other processes that `spread` has started
    several = {"strategy": settings.trainer.strategy} if ranks.world() > 1 else {}
    plugins = [WholeCheckpoints(), *([LightningEnvironment()] if ranks.world() > 1 else [])]
    return _trainer(
        settings.trainer,
        callbacks=chosen,
        **several,
        **({} if settings.trainer.options.get("plugins") else {"plugins": plugins}),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
        **options,
    )


def _trainer(asked: TrainerOptions, **options: Any) -> Trainer:
    """Returns the Trainer for the settings and the options of a phase.

    Raises:
        QexpError: Lightning rejects an option, or this machine has no such accelerator.
    """
    try:
        lightning = {key: value for key, value in asked.options.items() if key not in OWN}
        return make(
            {**lightning, "strategy": "auto", "devices": ranks.world(), "logger": False, **options}, where="trainer"
        )
    except QexpError as error:
        no_gpu = asked.accelerator in ("gpu", "cuda") and not torch.cuda.is_available()
        advice = (
            f"; torch finds no GPU here (trainer.accelerator={asked.accelerator}): use trainer=cpu" if no_gpu else ""
        )
        raise QexpError(f"trainer: {error.__cause__}{advice}" if error.__cause__ else f"{error}{advice}") from None


def check_trainer(settings: Settings) -> None:
    """Raises, before any work, if Lightning rejects the trainer's options or this machine lacks its devices."""
    processes(settings.trainer)
    key = repr(sorted(settings.trainer.options.items(), key=str))
    if key not in _tried:
        _trainer(settings.trainer, enable_checkpointing=False)
        _tried.add(key)


_tried: set[str] = set()  # making a Trainer takes longer than a small evaluation, so each is tried once per sweep


@dataclass(frozen=True)
class Part:
    """One of several trainings that follow each other in a run.

    Attributes:
        name: Its checkpoints lie in `checkpoints/NAME`; empty for the last.
        epochs: The number of its epochs.
        epochs_before, steps_before: Epochs and steps of the parts before it. The order and augmentation of the images, and the curves,
            continue from there.
    """

    name: str = ""
    epochs: int = 0
    epochs_before: int = 0
    steps_before: int = 0


def fit(
    module: Task,
    data: DataSet,
    settings: Settings,
    schedule: Schedule,
    phase: str,
    folder: Path,
    part: Part | None = None,
    observers: Sequence[Callback] = (),
) -> float:
    """Trains, and resumes from `checkpoints/last.ckpt` where an interrupted run left one; returns the seconds of all its sessions.

    `checkpoints/last.ckpt` is written after every epoch, `best.ckpt` when the validation score improves. The network
    ends in its last state. With `trainer.devices` above 1, that many processes share the images of each step; `observers`, callbacks that
    only look on, then see nothing of it.
    """
    if processes(settings.trainer) > ranks.world():
        state, module.trained, seconds = spread(
            settings, _fit_share, data, module, settings, schedule, phase, folder, part
        )
        module.load_state_dict(state)
        return seconds
    part = part or Part(epochs=schedule.epochs)
    checkpoints = folder / "checkpoints" / part.name
    # two callbacks, since a single one writes `last` only together with a new `best`
    mode = "max" if module.higher_is_better else "min"
    best = ModelCheckpoint(checkpoints, "best", monitor=module.monitor, mode=mode, enable_version_counter=False)
    newest = ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = make_trainer(
        settings,
        phase,
        folder,
        [EpochSeed(settings.seed, part.epochs_before), *helpers(schedule), best, newest, *observers],
        enable_checkpointing=True,
        max_epochs=part.epochs,
        max_steps=schedule.max_steps,
        gradient_clip_val=schedule.gradient_clip,
    )
    for callback in trainer.callbacks:
        if isinstance(callback, CsvCallback):
            callback.epochs_before, callback.steps_before = part.epochs_before, part.steps_before
        if isinstance(callback, History):
            callback.images = next(iter(data.val_dataloader()))[0]
    last = checkpoints / "last.ckpt"
    if last.exists() and _is_whole(last):
        check_recipe(module, last)
        log.info("%s: resuming from %s", phase, last)
    spare_single_image(module.model, data)
    module.began, module.data = time.perf_counter(), data
    images: dict[str, Any] = {"datamodule": data}
    if part.epochs_before:
        later = OffsetEpochs(data.train_dataloader(), part.epochs_before)
        images = {"train_dataloaders": later, "val_dataloaders": data.val_dataloader()}
    with interruptible(trainer), _fused_norms(settings, module.model, data):
        trainer.fit(module, **images, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    for callback in trainer.callbacks:
        if isinstance(callback, AveragedWeights):
            callback.take(module)
    seconds = module.seconds()
    # if an earlier process ran the last epoch, the scores come from the checkpoint
    module.trained = {**module.trained, "steps": trainer.global_step, **module.logged(), "seconds": seconds}
    return seconds


def _fused_norms(settings: Settings, model: nn.Module, data: DataSet) -> AbstractContextManager:
    """Returns what makes training steps on a CPU compute in fewer passes, where the settings allow it."""
    if settings.trainer.fused_norms and device_name(settings.trainer) == "cpu":
        return lean_training(model, data.example())
    return nullcontext()


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Re-raises Ctrl-C as `KeyboardInterrupt`; Lightning turns it into a silent `SystemExit` and leaves SIGINT ignored."""
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


def _fit_share(data: DataSet, module: Task, *args: Any) -> tuple[dict[str, Any], dict[str, float], float]:
    """Returns the trained state on the CPU, the results of the training, and the seconds it took."""
    seconds = fit(module, data, *args)
    return {key: value.cpu() for key, value in module.state_dict().items()}, module.trained, seconds


def _is_whole(checkpoint: Path) -> bool:
    """Returns whether a checkpoint can be read; removes a damaged one (half written as the machine failed) with a warning."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        log.warning(
            "%s is damaged (%s); training starts again", checkpoint, str(error).splitlines()[0] if str(error) else error
        )
        checkpoint.unlink(missing_ok=True)  # another rank may have removed it already
        return False
    return True


def helpers(schedule: Schedule) -> list[Callback]:
    """Returns the schedule's callbacks around optimizer steps: they average weights, and count or hold oscillating ones."""
    chosen: list[Callback] = []
    if schedule.oscillation:
        chosen.append(Oscillation(**schedule.oscillation))
    if schedule.ema is not None:
        chosen.append(AveragedWeights(schedule.ema))
    return chosen


def check_recipe(module: nn.Module, checkpoint: Path) -> None:
    """Raises if a checkpoint belongs to another network or recipe: its tensors, shapes or code limits differ."""
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
            f"{' ...' if len(differ) > 4 else ''}; run the recipe it was made with, or force=true to start again"
        )


def evaluate(
    model: nn.Module,
    data: DataSet,
    settings: Settings,
    phase: str,
    folder: Path,
    findings: dict[str, Any] | None = None,
) -> tuple[Score, float]:
    """Returns the score on the test samples and the seconds it took; puts into `findings` what the record says of the products."""
    findings = {} if findings is None else findings
    module = task(settings, model)
    module.data = data
    if processes(settings.trainer) > ranks.world() and module.merges:
        score, seconds, found = spread(settings, _evaluate_share, data, model, settings, phase, folder)
        findings |= found
        return score, seconds
    trainer = make_trainer(settings, phase, folder, enable_checkpointing=False)
    start = time.perf_counter()
    example = data.example()
    with (
        baked_weights(model),
        products(settings, model, example) as found,
        lean(model, example),
        interruptible(trainer),
    ):
        findings |= found
        trainer.test(module, datamodule=data, verbose=False)
    return module.score(), time.perf_counter() - start


def _evaluate_share(data: DataSet, model: nn.Module, *args: Any) -> tuple[Score, float, dict[str, Any]]:
    found: dict[str, Any] = {}
    score, seconds = evaluate(model, data, *args, findings=found)
    return score, seconds, found


def seed(value: int) -> None:
    """Seeds Python, NumPy and torch."""
    from pytorch_lightning import seed_everything

    seed_everything(value, workers=True, verbose=False)
