"""Classification: cross-entropy, top-1 and top-5 over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], Any]


class Classification(LightningModule):
    """Trains and scores a network `[N, C, H, W] -> [N, classes]`.

    Accuracies count samples: a short last batch weighs what it holds. Nothing is saved as a hyperparameter; the YAML beside the run is.

    Args:
        model: The network.
        num_classes: Number of classes.
        optimizer: Makes the optimizer from parameter groups; None where nothing is trained.
        scheduler: Makes the schedule from the optimizer and the number of steps.
        groups: Splits the network's parameters into groups with options of their own; None is one group.
        label_smoothing: Of the training loss.
        freeze_bn: Keep batch norms in evaluation mode while training.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        label_smoothing: float = 0.0,
        freeze_bn: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer, self.make_scheduler, self.groups = optimizer, scheduler, groups
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.freeze_bn = freeze_bn
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top1 = nn.ModuleDict({p: MulticlassAccuracy(num_classes, average="micro") for p in ("val", "test")})
        k = min(5, num_classes)
        self.top5 = nn.ModuleDict(
            {p: MulticlassAccuracy(num_classes, average="micro", top_k=k) for p in ("val", "test")}
        )
        self.hits: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_epoch_start(self) -> None:
        if self.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        loss = self.loss(logits, labels)
        self.train_top1(logits.detach(), labels)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        self.log("train_top1", self.train_top1, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def on_test_start(self) -> None:
        self.hits = []

    def _score(self, batch: tuple[Tensor, Tensor], part: str) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        self.top1[part](logits, labels)
        self.top5[part](logits, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log(f"{part}_loss", loss, batch_size=len(labels))
        self.log(f"{part}_top1", self.top1[part], prog_bar=True)
        self.log(f"{part}_top5", self.top5[part])
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        logits = self._score(batch, "test")
        self.hits.append((logits.argmax(1) == batch[1]).cpu())

    @property
    def correct(self) -> Tensor:
        """Which test samples were right, in order, as booleans `[n]`."""
        return torch.cat(self.hits) if self.hits else torch.zeros(0, dtype=torch.bool)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = (
            self.groups(self.model)
            if self.groups
            else [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        )
        optimizer = self.make_optimizer(groups)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.make_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
