"""Training curves, written during training."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import Trainer

from qexp.callbacks.csv_callback import CsvCallback
from qexp.tasks.base import Task


class Curves(CsvCallback):
    """Appends losses, scores and learning rates to `curves.csv`: columns step, epoch, name, value.

    Args:
        every: Steps between two points of the training loss and the learning rate.
        path: The file; the pipeline sets it to the run folder.
    """

    observes = True

    file = "curves.csv"
    columns = ("name", "value")

    def __init__(self, every: int = 20, path: str | Path | None = None) -> None:
        super().__init__(path)
        self.every = every

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            rates = {f"lr{i or ''}": group["lr"] for i, group in enumerate(trainer.optimizers[0].param_groups)}
            self._write(trainer, {"train_loss": float(outputs["loss"]), **rates})

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self._write(trainer, {k: float(metrics[k]) for k in ("val_loss", pl_module.monitor) if k in metrics})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Task) -> None:
        name = f"train_{pl_module.metric}"
        if name in trainer.callback_metrics:
            self._write(trainer, {name: float(trainer.callback_metrics[name])})

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self.writes(trainer):
            self.append(trainer, values.items())
