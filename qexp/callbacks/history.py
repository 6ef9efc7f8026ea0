"""The course of every quantizer during training: its scale and range, its error, the use of its levels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from qexp.analysis.tensor_errors import measure
from qexp.callbacks.csv_callback import CsvCallback
from qexp.callbacks.oscillation import Oscillation
from qexp.layers.quantized import quantizers
from qexp.quantizers.ends import ends

MEASURED = ("sqnr", "saturation", "levels_used")


class History(CsvCallback):
    """Appends a row per quantizer to `history.csv`, at `points` times evenly spread over the training.

    Columns: step, epoch, layer, site; scale (the median, where channels have their own), low and high end of the range; sqnr (dB),
    saturation (%) and levels_used (of levels) on some held-out images; for weights the shares (%) that oscillate and that are frozen.
    A network without quantizers gets no file. The measurement changes neither random numbers nor running statistics.

    Args:
        points: Number of measurements after the one before the first step; each takes as long as a step on as many images.
        images: Number of images.
        path: The file; the pipeline sets it to the run folder.
    """

    observes = True

    file = "history.csv"
    columns = ("layer", "site", "scale", "low", "high", *MEASURED, "levels", "oscillating", "frozen")

    def __init__(self, points: int = 16, images: int = 16, path: str | Path | None = None) -> None:
        super().__init__(path)
        self.points, self.n_images = points, images
        self.images: Tensor | None = None
        self.at: set[int] = set()

    def writes(self, trainer: Trainer) -> bool:
        return super().writes(trainer) and bool(self.at)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        carries = isinstance(self.images, Tensor) and any(True for _ in quantizers(pl_module.model))
        self.at = {math.ceil(total * i / self.points) for i in range(1, self.points + 1)} if carries else set()
        super().on_train_start(trainer, pl_module)
        if self.writes(trainer) and trainer.global_step == 0:
            self.append(trainer, self.rows(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step in self.at and self.writes(trainer):
            self.append(trainer, self.rows(trainer, pl_module))

    @torch.no_grad()
    def rows(self, trainer: Trainer, pl_module: LightningModule) -> list[list[Any]]:
        """Returns the present row of each quantizer of the network."""
        with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
            measured = measure(pl_module.model, self.images[: self.n_images].to(pl_module.device))
        moving = {}
        for callback in trainer.callbacks:
            if isinstance(callback, Oscillation):
                moving = {(name, "weight"): shares for name, *shares in callback.shares()}
        rows = []
        for name, site, q in quantizers(pl_module.model):
            scale = torch.as_tensor(q.scale).detach().float().flatten().cpu()
            seen = measured.get((name, site), {})
            rows.append(
                [name, site, float(scale.median()), *ends(q), *(seen.get(k, "") for k in MEASURED), q.levels]
                + (moving.get((name, site)) or ["", ""])
            )
        return rows
