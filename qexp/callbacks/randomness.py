"""Random numbers that depend on the epoch, not on whether earlier epochs ran in the same process."""

from __future__ import annotations

import hashlib
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything

from qexp.system import ranks


class EpochSeed(Callback):
    """Seeds Python, NumPy and torch before the first batch of every epoch, from the run's seed, the epoch and the rank.

    Whatever draws from the global generators (dropout, stochastic rounding, noise) therefore draws the same numbers with and without an
    interruption, and each rank draws its own.

    Args:
        seed: The seed of the run.
        epochs_before: Epochs of the trainings before this one in the same run.
    """

    def __init__(self, seed: int, epochs_before: int = 0) -> None:
        self.seed, self.epochs_before = seed, epochs_before

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        # not at the epoch's start: a DataLoader's iterator also draws a number, after that start or, when resuming, before it
        text = f"{self.seed} {self.epochs_before + trainer.current_epoch} {ranks.rank()}"
        seed_everything(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"), verbose=False)
