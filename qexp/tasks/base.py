"""What every task shares: how a network is trained and scored, and what its score is called and how sure it is."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from qexp.errors import QexpError
from qexp.system.whole_files import whole
from qexp.system.within import evaluating

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """How well a network does on the test samples; shares in 0..1, not percent.

    Attributes:
        metric: Column name: `top1`, `map_voc07`, `lfw_accuracy`.
        value: The share; NaN without a sample.
        low, high: Its 95 % interval.
        interval: How the interval was found.
        n: Samples: images, pairs.
        others: Further shares by column name, `top5`.
        outcomes: What each sample gave, arrays by name. `correct` `[n]` (booleans) where each sample is right or wrong: two
            networks are then compared by the paired test. Others are the task's own, for the page.
    """

    metric: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    others: Mapping[str, float] = field(default_factory=dict)
    outcomes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the score whole or not at all; where it cannot, the next run evaluates again, and the log says so."""
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
            OSError, ValueError, KeyError: The file is damaged or another one.
        """
        with np.load(path, allow_pickle=False) as kept:
            outcomes = {name.removeprefix("outcome."): kept[name] for name in kept.files if name != "score"}
            return cls(**json.loads(str(kept["score"])), outcomes=outcomes)


class Task(LightningModule):
    """Trains and scores a network whose input is a batch of images `[N, C, H, W]`, whatever its output means.

    A task writes `training_step`, `validation_step` (which logs `val_loss` and the `monitor`), `test_step` and `score`, and names
    its `metric`. The network's output is what the network computes: decoding it is the task's (or, asked by the task, the
    network's) job, outside `forward`, so that facts, calibration and measurement see one kind of model. Nothing is saved as a
    hyperparameter; the YAML beside the run is.

    Args:
        model: The network.
        optimizer: Makes the optimizer from parameter groups; None where nothing is trained.
        scheduler: Makes the schedule from the optimizer and the number of steps.
        groups: Splits the network's parameters into groups with options of their own; None is one group.
        freeze_bn: Keep batch norms in evaluation mode while training.
    """

    metric: ClassVar[str]
    merges: ClassVar[bool] = False  # `score` is that of all ranks' samples; a task that cannot is scored by one process
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

    def take_network(self, example: Tensor) -> None:
        """Makes the network return what the task reads, or raises in one sentence, before anything is trained.

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
        """What `best.ckpt` is the greatest of."""
        return f"val_{self.metric}"

    def score(self) -> Score:
        """The score of the test that has just run."""
        raise NotImplementedError

    def leave(self, folder: Path, score: Score, reference: Score | None, data: Any) -> None:
        """Writes into the run folder what else there is to see of a finished test; nothing, unless a task has something.

        Args:
            folder: Of the run.
            score: Of the quantized network.
            reference: Of the float network, where there is one.
            data: The data module.
        """

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def logged(self) -> dict[str, float]:
        """The values logged last in the training at hand; none before its first epoch."""
        return {key: float(value) for key, value in self.trainer.callback_metrics.items()}

    def seconds(self) -> float:
        """The seconds since `began` was set, and those the training at hand had taken before it was resumed."""
        return self.trained.get("seconds", 0.0) + time.perf_counter() - self.began

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what was logged last and the time so far: one that goes on, even from its last epoch, says what all training came to."""
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
        ) as error:  # an option of the optimizer whose place another has taken, or a value of none
            made = getattr(getattr(self.make_optimizer, "func", None), "__name__", "the optimizer")
            raise QexpError(
                f"schedule.optimizer: {made} cannot be made ({error}); optimizer=sgd, adam or adamw takes the place of the whole of it, "
                "and optimizer.lr=... sets its options"
            ) from None
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        try:
            scheduler = self.make_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        except TypeError as error:
            raise QexpError(
                f"schedule.scheduler: it cannot be made ({error}); scheduler=cosine, steps, exponential, onecycle or constant takes the "
                "place of the whole of it, and scheduler.final=... sets its options"
            ) from None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def evaluated(model: nn.Module, images: Tensor) -> Any:
    """Returns what a network returns in evaluation mode; its modules are left in the modes they were in."""
    with evaluating(model):
        return model(images)
