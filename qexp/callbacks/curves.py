"""Training curves, written as they grow."""

from __future__ import annotations

import csv
from pathlib import Path

from pytorch_lightning import Callback, Trainer

from qexp.tasks.base import Task


class Curves(Callback):
    """Appends losses, scores and learning rates to `curves.csv`: columns step, epoch, name, value.

    Args:
        every: Steps between two points of the training loss and the learning rate.
        path: The file; the pipeline sets it to the run folder.
    """

    def __init__(self, every: int = 20, path: str | Path | None = None) -> None:
        self.every = every
        self.path = Path(path) if path else None
        self.epochs_before = self.steps_before = 0  # of earlier trainings whose curves this one goes on

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:
        if self.path is None or not trainer.is_global_zero:
            return
        rows = self._kept(self.steps_before + trainer.global_step)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", "name", "value"])
            writer.writerows(rows)

    def _kept(self, step: int) -> list[list[str]]:
        """Returns the rows of an earlier, interrupted run up to the step it resumes from."""
        if step == 0 or not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in list(csv.reader(file))[1:] if len(row) == 4 and int(row[0]) <= step]

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
        if self.path is None or not trainer.is_global_zero:
            return
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(
                [self.steps_before + trainer.global_step, self.epochs_before + trainer.current_epoch, k, f"{v:.6g}"]
                for k, v in values.items()
            )
