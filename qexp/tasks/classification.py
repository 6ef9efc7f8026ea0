"""Classification: cross-entropy, top-1 and top-5 over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from qexp.results.confidence import wilson
from qexp.system.ranks import interleaved
from qexp.tasks.base import Score, Task
from qexp.tasks.class_scores import take_class_scores
from qexp.tasks.distillation import Distillation
from qexp.tasks.sharpness import SharpnessAware


class Classification(Task):
    """Trains and scores a network `[N, C, H, W] -> [N, classes]`; batches are `(images, labels [N])`.

    Accuracies count samples, so a short last batch has a smaller weight.

    Args:
        model: The network.
        num_classes: Number of classes.
        label_smoothing: Label smoothing of the training loss.
        distill: The losses against a teacher; None learns from the labels alone.
        sharpness: The sharpness-aware step; None takes the gradient at the weights themselves.
        learning: Arguments of `Task`: optimizer, scheduler, groups, freeze_bn.
    """

    metric, label = "top1", "top-1"
    merges = True
    of_schedule: ClassVar = ("label_smoothing",)

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        label_smoothing: float = 0.0,
        distill: Distillation | None = None,
        sharpness: SharpnessAware | None = None,
        **learning: Any,
    ) -> None:
        super().__init__(model, **learning)
        self.distill, self.sharpness = distill, sharpness
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.num_classes, self.k = num_classes, min(5, num_classes)
        self.train_top1: MulticlassAccuracy | None = None
        self.top1, self.top5 = nn.ModuleDict(), nn.ModuleDict()

    def setup(self, stage: str | None = None) -> None:
        """Makes what counts right answers, which a task that only judges outputs does without."""
        if self.train_top1 is not None:
            return
        self.train_top1 = MulticlassAccuracy(self.num_classes, average="micro")
        for part in ("val", "test"):
            self.top1[part] = MulticlassAccuracy(self.num_classes, average="micro")
            self.top5[part] = MulticlassAccuracy(self.num_classes, average="micro", top_k=self.k)

    def take_network(self, example: Tensor) -> None:
        """Makes the network return class scores alone; raises where its result has no recognisable ones."""
        take_class_scores(self.model, example, self.num_classes)

    def on_fit_start(self) -> None:
        if self.distill is not None:
            self.distill.teacher.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        self.setup()  # without a Trainer, nothing else calls it
        images, labels = batch
        seen: list[Tensor] = []

        def loss_of() -> Tensor:
            if self.distill is None:
                seen.append(self.model(images))
                return self.loss(seen[-1], labels)
            logits, taught = self.distill.step(self.model, images)
            seen.append(logits)
            return self.distill.labels * self.loss(logits, labels) + taught

        loss = loss_of() if self.sharpness is None else self.sharpness.loss(self.model, loss_of)
        self.train_top1(seen[-1].detach(), labels)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        self.log("train_top1", self.train_top1, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def evidence(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns whether the label of each sample is the first choice, and whether it is among the first five: booleans `[2, N]`."""
        labels = targets.to(outputs.device)
        among = outputs.topk(self.k).indices.eq(labels[:, None]).any(1)
        return torch.stack([self.decisions(outputs) == labels, among]).cpu()

    def decisions(self, outputs: Tensor) -> Tensor:
        """Returns the class with the greatest score `[N]`."""
        return outputs.argmax(1)

    def divergence(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Returns the Kullback-Leibler divergence of each sample's distribution from the wanted one, in nats `[N]`."""
        log_q, log_p = nn.functional.log_softmax(outputs, 1), nn.functional.log_softmax(wanted, 1)
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def score_of(self, evidence: Sequence[Tensor]) -> Score:
        hits = torch.cat(list(evidence), 1) if evidence else torch.zeros(2, 0, dtype=torch.bool)
        n = hits.shape[1]
        low, high = wilson(int(hits[0].sum()), n)
        top1, top5 = (float(h.double().mean()) if n else math.nan for h in hits)
        outcomes = {"correct": hits[0].numpy()}
        return self.scored(top1, low / 100, high / 100, "Wilson", n, others={"top5": top5}, outcomes=outcomes)

    def _score(self, batch: tuple[Tensor, Tensor], part: str) -> Tensor:
        self.setup()
        images, labels = batch
        logits = self.model(images)
        self.top1[part](logits, labels)
        self.top5[part](logits, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log(f"{part}_loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{part}_top1", self.top1[part], prog_bar=True)
        self.log(f"{part}_top5", self.top5[part])
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._score(batch, "val")

    def on_validation_epoch_end(self) -> None:
        pass  # the steps log accuracies that every process has added to

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.judged.append(self.evidence(self._score(batch, "test"), batch[1]))

    def score(self) -> Score:
        """The score of all processes' samples, in their order."""
        hits = torch.cat(self.judged, 1) if self.judged else torch.zeros(2, 0, dtype=torch.bool)
        return self.score_of([interleaved(hits)])
