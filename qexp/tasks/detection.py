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
from qexp.system.whole_files import write_text
from qexp.tasks.base import Score, Task
from qexp.tasks.detection_samples import samples
from qexp.tasks.mean_ap import Matches, class_ap, interval, match, mean_ap

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
        nms: Overlap above which, of two boxes of one class, only the one with the higher score stays.
        top: Detections kept per image.
        overlap: Intersection over union a detection must exceed to count.
        least_boxes: Classes with fewer objects in the test are left out of the mean.
        learning: Arguments of `Task`: optimizer, scheduler, groups, freeze_bn.
    """

    metric, label = "map_voc07", "mAP"

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

    def on_validation_epoch_end(self) -> None:
        matches = self._merged(self.judged)[1]
        value = float(mean_ap(matches, points=11, least=self.least_boxes)[0]) if len(matches.positives) else 0.0
        self.log(self.monitor, 0.0 if np.isnan(value) else value, prog_bar=True)

    def loss_of(self, raw: Tensor, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        easy = [~t["difficult"] for t in targets]
        boxes = [t["boxes"][keep] for t, keep in zip(targets, easy)]
        return self.model.loss(raw, boxes, [t["labels"][keep] for t, keep in zip(targets, easy)])

    def evidence(self, raw: Tensor, targets: Sequence[dict[str, Tensor]]) -> list[dict[str, np.ndarray]]:
        """Returns, per image, its detections (label, score, hit `[m]`, box `[m, 4]`) and its number of objects per class."""
        found = []
        for boxes, scores, target in zip(*(x.float().cpu() for x in self.model.decode(raw)), targets):
            kept, label, score = select(boxes, scores, self.confidence, self.nms, self.top)
            true, true_labels, difficult = (target[k].cpu() for k in ("boxes", "labels", "difficult"))
            hit = match(kept, label, score, true, true_labels, difficult, self.overlap)
            positives = np.bincount(true_labels[~difficult].numpy(), minlength=self.num_classes)
            one = {"label": label.numpy().astype(np.int16), "score": score.numpy(), "hit": hit, "box": kept.numpy()}
            found.append({**one, "positives": positives})
        return found

    def _merged(self, evidence: Sequence[list[dict[str, np.ndarray]]]) -> tuple[dict[str, np.ndarray], Matches]:
        """Returns every detection (image, label, score, hit `[m]` and box `[m, 4]`), and the matches with the objects."""
        images = [image for batch in evidence for image in batch]
        numbers = [np.full(len(image["label"]), i, dtype=np.int32) for i, image in enumerate(images)]
        found = {"image": np.concatenate([np.zeros(0, np.int32), *numbers])}
        empty = {"label": np.zeros(0, np.int16), "score": np.zeros(0, np.float32), "hit": np.zeros(0, np.int8)}
        for name, none in {**empty, "box": np.zeros((0, 4), np.float32)}.items():
            found[name] = np.concatenate([none, *(image[name] for image in images)])
        positives = np.array([image["positives"] for image in images], dtype=np.int64).reshape(-1, self.num_classes)
        return found, Matches(found["image"], found["label"], found["score"], found["hit"], positives)

    def score_of(self, evidence: Sequence[list[dict[str, np.ndarray]]]) -> Score:
        detections, found = self._merged(evidence)
        value, area = (float(mean_ap(found, points=p, least=self.least_boxes)[0]) for p in (11, None))
        low, high = interval(found, 11, self.least_boxes)
        counted = int((found.positives.sum(0) >= max(self.least_boxes, 1)).sum())
        outcomes = {**detections, "positives": found.positives, "class_ap": class_ap(found, points=11)[0]}
        how = f"bootstrap over images, {DRAWS} draws, {counted} classes"
        return self.scored(value, low, high, how, len(found.positives), others={"map_area": area}, outcomes=outcomes)

    def leave(self, folder: Path, score: Score, reference: Score | None, data: Any) -> None:
        """Writes `detections.json`: a few images with their boxes, float beside quantized."""
        write_text(folder / "detections.json", json.dumps(samples(score, reference, data)))


@torch.no_grad()
def select(boxes: Tensor, scores: Tensor, confidence: float, nms: float, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an image's detections after suppression: boxes `[m, 4]`, labels `[m]` and scores `[m]`, best first.

    Args:
        boxes: `[P, 4]`, corners.
        scores: `[P, classes]`; a box may be of several classes.
        confidence: Scores must be above it.
        nms: Overlap above which only the best of a class's boxes stays.
        top: Greatest number of detections to keep.
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
