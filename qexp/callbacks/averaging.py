"""Averaged weights: a moving average of the trained weights is validated, evaluated and saved."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from qexp.errors import QexpError

_AVERAGED_BUFFERS = ("running_mean", "running_var")


class AveragedWeights(WeightAveraging):
    """Updates `a <- d a + (1 - d) w` for every parameter, including learned scales, after each optimizer step.

    d is the decay, smaller at first: `min(decay, (1 + n) / (10 + n))` at update n, so that the average of a short training does not
    keep the first weights. The running statistics of batch norms are averaged in the same way, since the live ones belong to other weights.
    Every other buffer (code limits, the memory of a method) is the live network's. Checkpoints hold the average as the network, and
    the live state beside it, so that a resumed run continues with both.

    Args:
        decay: Near 1: 0.999 averages over about a thousand steps.

    Source: Polyak, Juditsky 1992; the first decays as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise QexpError(
                f"schedule.ema={decay} is not allowed; use a decay between 0 and 1, such as 0.999, or null for none"
            )
        self.decay = decay
        super().__init__(avg_fn=self._average)

    def _average(self, averaged: Tensor, live: Tensor, updates: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return live
        # In tensors: reading the number of updates would wait for the device once per parameter and step.
        n = torch.as_tensor(updates, dtype=torch.float64)
        share = 1 - ((1 + n) / (10 + n)).clamp_max(self.decay)
        return torch.lerp(averaged, live, share.to(averaged.dtype))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        live = dict(pl_module.named_buffers())
        for name, buffer in self._average_model.module.named_buffers():
            if not name.endswith(_AVERAGED_BUFFERS):
                buffer.copy_(live[name])

    def take(self, pl_module: LightningModule) -> None:
        """Puts the average into the network, in place, also where a resumed training had no step left."""
        self._copy_average_to_current(pl_module)
