"""Detection: the network's own loss, and mean average precision over the classes of VOC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms as suppress

from qexp.models.detector import Detector
from qexp.report.detections import write_detections
from qexp.system.whole_files import write_text
from qexp.tasks.base import Score, Task
from qexp.tasks.detection_samples import samples
from qexp.tasks.mean_ap import Matches, class_ap, interval, match, mean_ap

Batch = tuple[Tensor, Sequence[dict[str, Tensor]]]
DRAWS = 1000


class Detection(Task):
    """Trains and scores a `Detector`; batches are `(images [N, C, H, W], targets)`.

    A target is a dictionary: `boxes` `[n, 4]` (corners in shares of the image), `labels` `[n]`, `difficult` `[n]`. Difficult objects
    are neither trained on nor counted. All boxes are compared in shares of the image: intersection over union does not change when
    the axes are scaled.

    Args:
        model: The detector.
        num_classes: Number of classes.
        confidence: Scores that are not above it are dropped.
        nms: Of boxes of one class that overlap by more, the best scored stays.
        top: Detections kept of an image.
        overlap: Intersection over union a detection must exceed to count.
        least_boxes: Classes with fewer objects in the test are left out of the mean.
        learning: Optimizer, schedule, groups, freeze_bn, as `Task` takes them.
    """

    metric = "map_voc07"

    def __init__(
        self,
        model: Detector,
        num_classes: int,
        confidence: float = 0.01,
        nms: float = 0.45,
        top: int = 200,
        overlap: float = 0.5,
        least_boxes: int = 1,
        **learning: Any,
    ) -> None:
        super().__init__(model, **learning)
        self.num_classes, self.confidence, self.nms, self.top = num_classes, confidence, nms, top
        self.overlap, self.least_boxes = overlap, least_boxes
        self.found: list[dict[str, np.ndarray]] = []
        self.positives: list[np.ndarray] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self._loss(self.model(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self._add(batch, "val")

    def test_step(self, batch: Batch, _: int) -> None:
        self._add(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self.found, self.positives = [], []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        value = float(mean_ap(self.matches(), points=11, least=self.least_boxes)[0]) if self.positives else 0.0
        self.log(self.monitor, 0.0 if np.isnan(value) else value, prog_bar=True)

    def _loss(self, raw: Tensor, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        easy = [~t["difficult"] for t in targets]
        boxes = [t["boxes"][keep] for t, keep in zip(targets, easy)]
        return self.model.loss(raw, boxes, [t["labels"][keep] for t, keep in zip(targets, easy)])

    def _add(self, batch: Batch, part: str) -> None:
        """Counts a batch's detections."""
        images, targets = batch
        raw = self.model(images)
        self.log(f"{part}_loss", self._loss(raw, targets), batch_size=len(images))
        for boxes, scores, target in zip(*(x.float().cpu() for x in self.model.decode(raw)), targets):
            kept, label, score = select(boxes, scores, self.confidence, self.nms, self.top)
            true, true_labels, difficult = (target[k].cpu() for k in ("boxes", "labels", "difficult"))
            hit = match(kept, label, score, true, true_labels, difficult, self.overlap)
            number = np.full(len(kept), len(self.positives), dtype=np.int32)
            self.positives.append(np.bincount(true_labels[~difficult].numpy(), minlength=self.num_classes))
            one = {"image": number, "label": label.numpy().astype(np.int16), "score": score.numpy(), "hit": hit}
            self.found.append({**one, "box": kept.numpy()})

    def detections(self) -> dict[str, np.ndarray]:
        """Every detection so far: image, label, score, hit `[m]` and box `[m, 4]`."""
        empty = {"image": np.zeros(0, np.int32), "label": np.zeros(0, np.int16), "score": np.zeros(0, np.float32)}
        empty |= {"hit": np.zeros(0, np.int8), "box": np.zeros((0, 4), np.float32)}
        return {name: np.concatenate([none, *(one[name] for one in self.found)]) for name, none in empty.items()}

    def matches(self) -> Matches:
        """What every detection so far turned out to be."""
        all_ = self.detections()
        positives = np.array(self.positives, dtype=np.int64).reshape(-1, self.num_classes)
        return Matches(all_["image"], all_["label"], all_["score"], all_["hit"], positives)

    def score(self) -> Score:
        found, least = self.matches(), self.least_boxes
        value, area = (float(mean_ap(found, points=p, least=least)[0]) for p in (11, None))
        low, high = interval(found, 11, least)
        counted = int((found.positives.sum(0) >= max(least, 1)).sum())
        outcomes = {**self.detections(), "positives": found.positives, "class_ap": class_ap(found, points=11)[0]}
        how = f"bootstrap over images, {DRAWS} draws, {counted} classes"
        return Score(self.metric, value, low, high, how, len(found.positives), {"map_area": area}, outcomes)

    def leave(self, folder: Path, score: Score, reference: Score | None, data: Any) -> None:
        """Writes `detections.json` and, from it, `detections.html`: a few images with their boxes, float beside quantized."""
        write_text(folder / "detections.json", json.dumps(samples(score, reference, data)))
        write_detections(folder)


@torch.no_grad()
def select(boxes: Tensor, scores: Tensor, confidence: float, nms: float, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of an image's candidates: boxes `[m, 4]`, labels `[m]` and scores `[m]`, best first.

    Args:
        boxes: `[P, 4]`, corners.
        scores: `[P, classes]`; a box may be of several classes.
        confidence: Scores must be above it.
        nms: Of overlapping boxes of one class the best stays.
        top: At most so many are kept.
    """
    rows, labels = (scores > confidence).nonzero(as_tuple=True)
    values, candidates = scores[rows, labels], boxes[rows]
    kept = []
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        kept.append(mine[suppress(candidates[mine], values[mine], nms)])
    kept = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)
    kept = kept[values[kept].argsort(descending=True, stable=True)[:top]]
    return candidates[kept], labels[kept], values[kept]
