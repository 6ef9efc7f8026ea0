"""Ends a training whose learned scales vanish or are no longer finite, before a checkpoint stores them."""

from __future__ import annotations

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from qexp.errors import QexpError


class Divergence(Callback):
    """Raises, with layer and step, when a module's `must_stay_positive()` is zero, negative or not finite.

    Modules without that method are ignored. The check reduces the scales of all modules at once. It runs before validation and
    checkpoints at the end of each epoch, so that `checkpoints/last.ckpt` is always sound. On a CPU it also runs after every step, since
    the kernels would refuse such a scale without naming the layer. On an accelerator, where a check has to wait for the device, it
    runs after every few steps.

    Args:
        every: Optimizer steps between two checks on an accelerator.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.watched: list[tuple[str, nn.Module]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [(name, m) for name, m in pl_module.named_modules() if callable(getattr(m, "must_stay_positive", None))]
        self.watched = [(getattr(m, "name", name), m) for name, m in found if m.must_stay_positive() is not None]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        on_cpu = pl_module.device.type == "cpu"
        if self.watched and (on_cpu or trainer.global_step % self.every == 0 or trainer.is_last_batch):
            self.check(trainer.global_step)

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Raises if a learned scale has diverged by this optimizer step."""
        values = [m.must_stay_positive().flatten().float() for _, m in self.watched]
        together = torch.cat(values)
        if bool((torch.isfinite(together) & (together > 0)).all()):
            return
        broken = [(name, v, int((~(torch.isfinite(v) & (v > 0))).sum())) for (name, _), v in zip(self.watched, values)]
        broken = [(name, v, n) for name, v, n in broken if n]
        name, v, n = broken[0]
        others = f", and of {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise QexpError(
            f"{name}: the training diverged: at optimizer step {step}, {n} of {len(v)} learned scales{others} vanished, overflowed or "
            "are not numbers. The checkpoint of the last sound epoch stays in the run's folder. Try a lower rate for what quantizers "
            "learn (schedule.quantizer.lr), a lower schedule.optimizer.lr, schedule.gradient_clip=1, or more bits"
        )
