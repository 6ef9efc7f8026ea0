"""Updates modules that keep a memory, once per optimizer step."""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer


class OptimizerSteps(Callback):
    """Calls `after_optimizer_step()` of every module that has this method, after each step of each optimizer.

    Before the first step it calls `before_training(total_steps)` of every module that has it, after a resumed training has loaded its
    state.

    The optimizer's own hook is used: it runs once per step, also with gradient accumulation, and never in evaluation.
    """

    def __init__(self) -> None:
        self.handles: list = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        owners = [m for m in pl_module.modules() if callable(getattr(m, "after_optimizer_step", None))]

        total = int(trainer.estimated_stepping_batches)
        for module in pl_module.modules():
            if callable(getattr(module, "before_training", None)):
                module.before_training(total)

        def after(*_: object) -> None:
            for module in owners:
                module.after_optimizer_step()

        self.handles = [optimizer.register_step_post_hook(after) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
