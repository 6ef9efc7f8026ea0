"""Random numbers that belong to an epoch, whether or not the ones before it ran in the same process."""

from __future__ import annotations

import hashlib
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything

from qexp.system import ranks


class EpochSeed(Callback):
    """Seeds Python, NumPy and torch before the first batch of every epoch, from the run's seed, the epoch and the rank.

    What draws from the global generators (dropout, stochastic rounding, noise) so draws the same after an interruption as without
    one, and each rank draws its own.

    Args:
        seed: The run's.
        epochs_before: Epochs of the trainings before this one in the same run.
    """

    def __init__(self, seed: int, epochs_before: int = 0) -> None:
        self.seed, self.epochs_before = seed, epochs_before

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        # not at the epoch's start: a DataLoader's iterator draws a number too, after that start, or before it where training resumes
        text = f"{self.seed} {self.epochs_before + trainer.current_epoch} {ranks.rank()}"
        seed_everything(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"), verbose=False)
