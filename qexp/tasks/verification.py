"""Verification: are two faces the same person? Accuracy by folds, ROC, and training with a cosine margin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.data.pair_lists import Pair
from qexp.errors import QexpError
from qexp.results.confidence import wilson
from qexp.system.whole_files import whole, write_text
from qexp.tasks.base import Score, Task

SHOWN = 20  # pairs whose faces are kept, with `show_images`
_FAR = (0.1, 0.01, 0.001)  # false accept rates whose true accept rate is reported


class Verification(Task):
    """Trains and scores an embedding network `[N, C, H, W] -> [N, features]`; batches are `(images, positions or persons [N])`.

    Scored by pairs: the features of an image and of its mirror image side by side, minus their mean over the other folds, compared by
    cosine; a pair is one person if the cosine exceeds the threshold that is best on the other folds (on the same fold if there is
    only one). The test data module offers `pairs`, `held_out` and `places`.

    The output of one image is not a decision, and a pair needs mirror images and the mean over all images, so proofs have no score.

    Training classifies persons: cross-entropy over the cosines to one direction per person, with a margin for the right one.

    Args:
        model: The network.
        features: Length of the embedding.
        identities: Greatest number of persons in training.
        scale, margin: Scale and margin of the cosines, in training.
        mirror: Use the mirror image too.
        show_images: Show the most shifted pairs' faces on the run's page; off by default, since they are real people.
        learning: Arguments of `Task`: optimizer, scheduler, groups, freeze_bn.

    Source: protocol Huang et al. 2007 (LFW, image-restricted); margin Wang et al. 2018 (arXiv 1801.09414), equation 4.
    """

    metric, label = "lfw_accuracy", "LFW"

    def __init__(
        self,
        model: nn.Module,
        features: int = 128,
        identities: int = 6000,
        scale: float = 30.0,
        margin: float = 0.35,
        mirror: bool = True,
        show_images: bool = False,
        **learning: Any,
    ) -> None:
        super().__init__(model, **learning)
        self.scale, self.margin, self.mirror, self.show_images = scale, margin, mirror, show_images
        self.persons = None
        if self.make_optimizer is not None:
            directions = torch.randn(identities, features, generator=torch.Generator().manual_seed(0))
            self.persons = nn.Parameter(F.normalize(directions))
            own = self.groups or (lambda model: [{"params": list(model.parameters())}])
            self.groups = lambda model: [*own(model), {"params": [self.persons]}]
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, persons = batch
        if int(persons.max()) >= len(self.persons):
            raise QexpError(f"task.identities={len(self.persons)} is too small: the training images show more persons")
        cosines = F.normalize(self.model(images)) @ F.normalize(self.persons).T
        right = F.one_hot(persons, len(self.persons))
        loss = F.cross_entropy(self.scale * (cosines - self.margin * right), persons)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def _embed(self, batch: tuple[Tensor, Tensor]) -> None:
        images, positions = batch
        parts = [self.model(images)]
        if self.mirror:
            parts.append(self.model(images.flip(-1)))
        self.seen.append((positions.cpu(), torch.cat(parts, 1).float().cpu()))

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def on_test_start(self) -> None:
        self.seen = []

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._embed(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._embed(batch)

    def on_validation_epoch_end(self) -> None:
        data = self.data
        x, y, same, _ = self._features(data.held_out, data.places)
        cosines = compare(x, y, x, y)
        self.log("val_loss", float(np.where(same, 1 - cosines, cosines.clip(0)).mean()))
        accuracy = float(((cosines > best_threshold(cosines, same)) == same).mean())
        self.log(self.monitor, accuracy, prog_bar=True)

    def on_test_end(self) -> None:
        data = self.data
        self.pairs, self.places = data.pairs, data.places

    def score(self) -> Score:
        x, y, same, folds = self._features(self.pairs, self.places)
        cosines, correct = judge(x, y, same, folds)
        low, high = wilson(int(correct.sum()), len(correct))
        by_fold = [float(correct[folds == fold].mean()) for fold in np.unique(folds)]
        others = {"lfw_sd": float(np.std(by_fold, ddof=1)) if len(by_fold) > 1 else math.nan}
        for far in _FAR:
            if (~same).sum() * far >= 1:  # with fewer pairs, no threshold has that rate
                others[f"tar_far_{far:g}"] = tar_at_far(cosines, same, far)
        outcomes = {"correct": correct, "cosines": cosines, "same": same, "folds": folds}
        value = float(correct.mean())
        how = "Wilson over pairs"
        return self.scored(value, low / 100, high / 100, how, len(same), others=others, outcomes=outcomes)

    def _features(self, pairs: list[Pair], places: dict[str, int]) -> tuple[np.ndarray, ...]:
        """Returns the features of both sides of pairs `[n, d]`, whether they are the same person `[n]`, and their folds `[n]`."""
        rows = np.full(len(places), -1)
        at, found = (torch.cat(part).numpy() for part in zip(*self.seen))
        rows[at] = np.arange(len(at))
        sides = [rows[[places[p[i]] for p in pairs]] for i in (0, 1)]
        if min(side.min() for side in sides) < 0:
            raise QexpError(
                "verification: not every image of the pairs was seen; do not limit test or validation batches"
            )
        x, y = (found[side].astype(np.float64) for side in sides)
        return x, y, np.array([p.same for p in pairs]), np.array([p.fold for p in pairs])

    def leave(self, folder: Path, score: Score, reference: Score | None, data: Any) -> None:
        """Writes `pairs.csv`, each pair's cosine in float and quantized, the most shifted first; their faces only with `show_images`."""
        outcomes = score.outcomes
        table = pd.DataFrame(
            {
                "fold": outcomes["folds"],
                "a": [p.a for p in data.pairs],
                "b": [p.b for p in data.pairs],
                "same": outcomes["same"],
                "cosine": outcomes["cosines"],
                "correct": outcomes["correct"],
            }
        )
        if reference is not None and len(reference.outcomes["cosines"]) == len(table):
            table["cosine_float"] = reference.outcomes["cosines"]
            table["correct_float"] = reference.outcomes["correct"]
            table["shift"] = table.cosine - table.cosine_float
            table = table.sort_values("shift", key=np.abs, ascending=False)
        write_text(folder / "pairs.csv", table.to_csv(index=False, float_format="%.6f"))
        if self.show_images:
            faces = self._thumbnails(table.head(SHOWN), data)
            with whole(folder / "faces.npz") as part, part.open("wb") as file:
                np.savez_compressed(file, names=list(faces), images=np.stack(list(faces.values())))

    @staticmethod
    def _thumbnails(table: pd.DataFrame, data: Any) -> dict[str, np.ndarray]:
        """Returns the faces of the pairs shown, RGB `[H, W, 3]`, by name."""
        names = sorted({*table.a, *table.b})
        return {name: data.faces[data.places[name]].permute(1, 2, 0).numpy() for name in names}


def compare(x: np.ndarray, y: np.ndarray, *seen: np.ndarray) -> np.ndarray:
    """Returns the cosines `[n]` of two lists of features `[n, d]`, minus the mean of the features in `seen`."""
    mean = np.concatenate(seen).mean(0)
    x, y = x - mean, y - mean
    return (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)


def judge(x: np.ndarray, y: np.ndarray, same: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pair's cosine `[n]` and whether it is judged correctly `[n]`, by mean and threshold of the other folds."""
    cosines, correct = np.zeros(len(same)), np.zeros(len(same), dtype=bool)
    for fold in np.unique(folds):
        own = folds == fold
        others = ~own if (~own).any() else own
        all_cosines = compare(x, y, x[others], y[others])
        threshold = best_threshold(all_cosines[others], same[others])
        cosines[own] = all_cosines[own]
        correct[own] = (all_cosines[own] > threshold) == same[own]
    return cosines, correct


def best_threshold(cosines: np.ndarray, same: np.ndarray) -> float:
    """Returns the threshold in -1, -0.9999 .. 1 with the most correct answers (one person above it); of several, the lowest."""
    grid = np.linspace(-1, 1, 20001)
    accepted = len(cosines[same]) - np.searchsorted(np.sort(cosines[same]), grid, side="right")
    refused = np.searchsorted(np.sort(cosines[~same]), grid, side="right")
    return float(grid[np.argmax(accepted + refused)])


def tar_at_far(cosines: np.ndarray, same: np.ndarray, far: float) -> float:
    """Returns the share of same pairs accepted at the lowest threshold that accepts at most the share `far` of different ones."""
    strangers = np.sort(cosines[~same])[::-1]
    allowed = math.floor(far * len(strangers) + 1e-9)
    threshold = strangers[allowed] if allowed < len(strangers) else -math.inf
    return float((cosines[same] > threshold).mean())
