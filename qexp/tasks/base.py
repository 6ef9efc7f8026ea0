"""The base of all tasks: training and scoring of a network, and its score with metric and interval."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from qexp.errors import QexpError
from qexp.results.measure import Measure, is_possible_share
from qexp.system.whole_files import whole
from qexp.system.within import evaluating

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A network's score on the test samples; a share lies in 0..1 and is not a percentage.

    Attributes:
        metric: Column name: `top1`, `map_voc07`, `psnr`.
        value: The score; NaN where there is no sample.
        low, high: Its 95 % interval; NaN where there is none.
        interval: How the interval was found.
        n: Samples: images, pairs.
        others: Further numbers by column name, `top5`; shares where the score is one.
        outcomes: The results of each sample, arrays by name. `correct` `[n]` (booleans) where each sample is right or wrong: two
            networks are then compared by the paired test. Other arrays belong to the task, for the page.
        label, unit, is_share, higher_is_better: The kind of the numbers, see `Measure`.

    Raises:
        QexpError: A share does not lie in 0..1.
    """

    metric: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    others: Mapping[str, float] = field(default_factory=dict)
    outcomes: Mapping[str, np.ndarray] = field(default_factory=dict)
    label: str = ""
    unit: str = ""
    is_share: bool = True
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        numbers = {"value": self.value, "low": self.low, "high": self.high, **self.others}
        wrong = [name for name, number in numbers.items() if self.is_share and not is_possible_share(number)]
        if wrong:
            raise QexpError(
                f"metric {self.metric}: {wrong[0]}={numbers[wrong[0]]:g} is not a share in 0..1; divide it by its greatest value, or "
                "set is_share = False and the unit in the task"
            )

    @property
    def measure(self) -> Measure:
        """The kind of the numbers: a share or not, better upwards or downwards, the unit."""
        row = {"metric": self.metric, "metric_label": self.label, "unit": self.unit}
        return Measure.of(row | {"is_share": self.is_share, "higher_is_better": self.higher_is_better})

    def save(self, path: Path) -> None:
        """Writes the score whole or not at all; if that fails, logs a warning, and the next run evaluates again."""
        plain = {k: v for k, v in vars(self).items() if k != "outcomes"}
        arrays = {f"outcome.{name}": array for name, array in self.outcomes.items()}
        try:
            with whole(path) as part, part.open("wb") as file:
                np.savez_compressed(file, score=np.array(json.dumps(plain)), **arrays)
        except OSError as error:
            log.warning("the score could not be kept in %s: %s", path, error)

    @classmethod
    def load(cls, path: Path) -> Score:
        """Returns a saved score.

        Raises:
            OSError, ValueError, KeyError: The file is damaged or is not a score.
        """
        with np.load(path, allow_pickle=False) as kept:
            outcomes = {name.removeprefix("outcome."): kept[name] for name in kept.files if name != "score"}
            plain = json.loads(str(kept["score"]))
        try:
            return cls(**plain, outcomes=outcomes)
        except (TypeError, QexpError) as error:
            raise ValueError(f"{path}: not a score of this version ({error})") from error


class Task(LightningModule):
    """Trains and scores a network whose input is a batch of images `[N, C, H, W]`; subclasses interpret its output.

    A task names and describes its `metric`, and implements `loss_of`, `evidence` and `score_of`. The scores of a run, of a proof on
    integers and of an exported file are then computed in one way. A task that needs more than outputs and targets writes the steps and
    `score` itself (`validation_step` logs `val_loss` and the `monitor`). It may leave out `evidence`; proofs then have no score. The
    network's `forward` returns what the network computes. The task, or another method of the network, decodes it, so that facts,
    calibration and measurement work on one kind of model. Nothing is saved as a hyperparameter; the YAML beside the run holds it all.

    Attributes:
        metric: Column name of the score, and of `monitor`.
        label: A short name for people; the metric's name by default.
        unit: Unit of a score that is not a share: `dB`.
        is_share: Whether the score is a share in 0..1; records then hold it in percent.
        higher_is_better: Whether more is better.

    Args:
        model: The network.
        optimizer: Makes the optimizer from parameter groups; None where nothing is trained.
        scheduler: Makes the schedule from the optimizer and the number of steps.
        groups: Splits the network's parameters into groups with options of their own; None is one group.
        freeze_bn: Keep batch norms in evaluation mode while training.
    """

    metric: ClassVar[str]
    label: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    is_share: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True
    merges: ClassVar[bool] = False  # `score` covers the samples of all ranks; if False, one process scores all samples
    of_schedule: ClassVar[tuple[str, ...]] = ()  # keys of the schedule that a subclass takes as arguments

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        freeze_bn: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer, self.make_scheduler, self.groups = optimizer, scheduler, groups
        self.freeze_bn = freeze_bn
        # `steps`, `seconds` and the last logged values of the training that has just ended, or of the part of it before a resume
        self.trained: dict[str, Any] = {}
        self.began = time.perf_counter()
        self.data: Any = None  # the data set; training and evaluation set it before they start
        self.judged: list[Any] = []  # evidence of the batches of the present validation or test

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """Returns the loss of a batch."""
        raise NotImplementedError

    def evidence(self, outputs: Any, targets: Any) -> Any | None:
        """Returns the part of a batch's outputs that the score needs, small enough to keep; None if outputs alone do not suffice."""
        return None

    def score_of(self, evidence: Sequence[Any]) -> Score | None:
        """Returns the score of batches' evidence; None where the task cannot score outputs alone."""
        return None

    def judge(self, outputs: Any, targets: Any) -> Score | None:
        """Returns the score of outputs `[N, ...]` of the network, of its integer program or of a file in another runtime.

        The result is None where the task cannot score outputs alone.
        """
        found = self.evidence(outputs, targets)
        return None if found is None else self.score_of([found])

    def decisions(self, outputs: Any) -> Tensor | None:
        """Returns what the network decides for each sample, whole numbers `[N, ...]`; None where its outputs are not decisions."""
        return None

    def divergence(self, outputs: Tensor, wanted: Tensor) -> Tensor | None:
        """Returns the distance of each sample's outputs from wanted ones `[N]`; None selects the error relative to the signal."""
        return None

    @property
    def measure(self) -> Measure:
        """The kind of the score's numbers."""
        return Measure.of(self._about() | {"metric": self.metric, "metric_label": self.label})

    def scored(self, value: float, low: float, high: float, interval: str, n: int, **more: Any) -> Score:
        """Returns a score of this task's metric; the arguments are those of `Score`."""
        return Score(self.metric, value, low, high, interval, n, label=self.label, **more, **self._about())

    def _about(self) -> dict[str, Any]:
        return {"unit": self.unit, "is_share": self.is_share, "higher_is_better": self.higher_is_better}

    def training_step(self, batch: tuple[Tensor, Any], _: int) -> Tensor:
        images, targets = batch
        loss = self.loss_of(self.model(images), targets)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Any], _: int) -> None:
        self._judge_batch(batch, "val")

    def test_step(self, batch: tuple[Tensor, Any], _: int) -> None:
        self._judge_batch(batch, "test")

    def _judge_batch(self, batch: tuple[Tensor, Any], part: str) -> None:
        images, targets = batch
        outputs = self.model(images)
        self.log(f"{part}_loss", self.loss_of(outputs, targets), batch_size=len(images), sync_dist=True)
        self.judged.append(self.evidence(outputs, targets))

    def on_validation_epoch_start(self) -> None:
        self.judged = []

    def on_test_epoch_start(self) -> None:
        self.judged = []

    def on_validation_epoch_end(self) -> None:
        self.log(self.monitor, self.score().value, prog_bar=True, sync_dist=True)

    def take_network(self, example: Tensor) -> None:
        """Makes the network return what the task reads, or raises, before anything is trained.

        Args:
            example: One image `[1, C, H, W]`.
        """
        with torch.no_grad():
            result = evaluated(self.model, example)
        if not isinstance(result, Tensor):
            raise QexpError(
                f"{type(self.model).__name__} returns a {type(result).__name__}; {type(self).__name__} needs a network that returns one "
                "tensor: wrap it in a module that does"
            )

    @property
    def monitor(self) -> str:
        """The logged name that selects `best.ckpt`: its greatest value, or its least where less is better."""
        return f"val_{self.metric}"

    def score(self) -> Score:
        """The score of the test (or of the validation) that has just run."""
        score = self.score_of(self.judged)
        if score is None:
            raise NotImplementedError(f"{type(self).__name__} implements neither score_of nor score")
        return score

    def leave(self, folder: Path, score: Score, reference: Score | None, data: Any) -> None:
        """Writes further results of a finished test into the run folder; by default nothing.

        Pages are made from these files, by their names, when the study is finished (`qexp.report.point_pages`).

        Args:
            folder: The folder of the run.
            score: The score of the quantized network.
            reference: The score of the float network, where there is one.
            data: The data module.
        """

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def logged(self) -> dict[str, float]:
        """The values logged last in the present training; empty before its first epoch."""
        return {key: float(value) for key, value in self.trainer.callback_metrics.items()}

    def seconds(self) -> float:
        """The seconds since `began` was set, plus those that the present training took before it was resumed."""
        return self.trained.get("seconds", 0.0) + time.perf_counter() - self.began

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the last logged values and the time so far, so that a resumed training reports the results of all its sessions."""
        checkpoint["trained"] = {**self.trained, **self.logged(), "seconds": self.seconds()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained = dict(checkpoint.get("trained", {}))

    def on_train_epoch_start(self) -> None:
        if self.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def configure_optimizers(self) -> dict[str, Any]:
        groups = (
            self.groups(self.model)
            if self.groups
            else [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        )
        try:
            optimizer = self.make_optimizer(groups)
        except (
            TypeError,
            ValueError,
        ) as error:  # an option of another optimizer, or a value that is not allowed
            made = getattr(getattr(self.make_optimizer, "func", None), "__name__", "the optimizer")
            raise QexpError(
                f"schedule.optimizer: {made} cannot be made ({error}); choose another as a whole with optimizer=sgd, adam or adamw, "
                "and set its options with optimizer.lr=..."
            ) from None
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        try:
            scheduler = self.make_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        except TypeError as error:
            raise QexpError(
                f"schedule.scheduler: it cannot be made ({error}); choose another as a whole with scheduler=cosine, steps, exponential, "
                "onecycle or constant, and set its options with scheduler.final=..."
            ) from None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def evaluated(model: nn.Module, images: Tensor) -> Any:
    """Returns the network's outputs in evaluation mode; afterwards its modules are in their previous modes."""
    with evaluating(model):
        return model(images)
