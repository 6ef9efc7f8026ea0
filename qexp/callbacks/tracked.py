"""Training curves for trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytorch_lightning import Callback, Trainer

from qexp.tasks.base import Task


class Tracked(Callback):
    """Sends the training loss and the learning rate every few steps, and the validation scores after each epoch.

    Args:
        send: Called with scalars by name and the step.
        steps_before: Steps of the trainings that this one continues.
        every: Steps between two points of the training loss.
    """

    observes = True

    def __init__(
        self, send: Callable[[Mapping[str, float], int], None], steps_before: int = 0, every: int = 10
    ) -> None:
        self.send, self.steps_before, self.every = send, steps_before, every

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._send(trainer, {"train_loss": float(outputs["loss"]), "lr": rate})

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:
        found = trainer.callback_metrics
        if not trainer.sanity_checking:
            self._send(trainer, {k: float(found[k]) for k in ("val_loss", pl_module.monitor) if k in found})

    def _send(self, trainer: Trainer, scalars: Mapping[str, float]) -> None:
        if trainer.is_global_zero:
            self.send(scalars, self.steps_before + trainer.global_step)
