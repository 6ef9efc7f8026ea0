"""One progress line per phase, with the time left; it disappears when the phase ends."""

from __future__ import annotations

import sys

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm


class Progress(ProgressBar):
    """A single line for a whole training (all epochs, with loss, accuracies and the time left), and one for an evaluation.

    Args:
        phase: Words that name what runs: `float`, `resnet20 lsq qat W4A4`.
        every: Seconds between two updates on a terminal; in a log file, where each update is a line, twenty times as long.
    """

    observes = True

    def __init__(self, phase: str = "", every: float = 0.5) -> None:
        super().__init__()
        self.phase, self.every = phase, every
        self.bar: tqdm | None = None
        self.on = True

    def disable(self) -> None:
        self.on = False

    def enable(self) -> None:
        self.on = True

    def _start(self, verb: str, total: int, initial: int = 0) -> None:
        pause = self.every if sys.stderr.isatty() else 20 * self.every
        self.bar = tqdm(
            total=total,
            initial=initial,
            desc=f"{verb} {self.phase}".strip(),
            leave=False,
            mininterval=pause,
            maxinterval=pause,
            dynamic_ncols=True,
            disable=not self.on,
        )

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("train", int(trainer.estimated_stepping_batches), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if self.bar is not None and self.bar.update(trainer.global_step - self.bar.n):
            shown = {k: float(v) for k, v in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix({"epoch": f"{trainer.current_epoch + 1}/{trainer.max_epochs}"} | shown, refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("evaluate", int(sum(trainer.num_test_batches)))

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
