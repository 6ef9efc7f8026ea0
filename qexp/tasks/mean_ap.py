"""Average precision of detections, as the VOC challenge defines it, and its interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

TRUE, FALSE, IGNORED = 1, 0, -1
_CHUNK = 2_000_000  # weighted detections held at once by the bootstrap


class Matches(NamedTuple):
    """The matches of all detections of a test with objects.

    Attributes:
        image: Index of the image `[m]`.
        label: Class of the detection `[m]`.
        score: Score of the detection `[m]`.
        hit: `TRUE`, `FALSE` or `IGNORED` (it lies on a difficult object) `[m]`.
        positives: Objects to be found, by image and class `[images, classes]`; difficult ones are not counted.
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    positives: np.ndarray


def match(
    boxes: Tensor, labels: Tensor, scores: Tensor, true: Tensor, true_labels: Tensor, difficult: Tensor, overlap: float
) -> np.ndarray:
    """Returns whether each of an image's detections is right `[m]`: per object, only the one with the best score is.

    Args:
        boxes: Corners `[m, 4]`.
        labels: `[m]`.
        scores: `[m]`; of equal ones the earlier is taken first.
        true: Corners of the objects `[n, 4]`.
        true_labels: `[n]`.
        difficult: `[n]`; a detection whose best object is difficult counts neither way.
        overlap: Intersection over union that must be exceeded.

    Source: Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, 2010, IJCV 88, section 4.4.
    """
    out = np.full(len(boxes), FALSE, dtype=np.int8)
    if not len(true):
        return out
    overlaps = box_iou(boxes.double(), true.double())
    overlaps[labels[:, None] != true_labels] = -1.0
    best, which = overlaps.max(1)
    taken = torch.zeros(len(true), dtype=torch.bool)
    for at in scores.argsort(descending=True, stable=True).tolist():
        if best[at] <= overlap:
            continue
        found = int(which[at])
        if difficult[found]:
            out[at] = IGNORED
        elif not taken[found]:
            out[at], taken[found] = TRUE, True
    return out


def average_precision(true: np.ndarray, wrong: np.ndarray, positives: np.ndarray, points: int | None) -> np.ndarray:
    """Returns the average precision `[d]` of one class, for each of d weightings.

    Args:
        true: Number of times that each detection counts as right, best score first `[d, m]`; integers.
        wrong: Number of times that it counts as wrong `[d, m]`.
        positives: Objects to be found `[d]`; the result is NaN where there are none.
        points: 11 is the mean of the best precision at a recall of at least 0, 0.1, ... 1 (VOC up to 2009); None the area under the
            precision-recall curve made monotone (VOC since 2010).
    """
    if not true.shape[1]:
        return np.where(positives > 0, 0.0, np.nan)
    hits, misses = true.cumsum(1), wrong.cumsum(1)
    precision = hits / np.maximum(hits + misses, 1)
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # at this recall or beyond
    if points is None:
        total = (true * best).sum(1) / np.maximum(positives, 1)
    else:
        total = np.zeros(len(true))
        for k in range(points):  # compared in integers: 3 of 10 is a recall of at least 0.3
            reached = hits * (points - 1) >= k * positives[:, None]
            first = reached.argmax(1)
            total += np.where(reached.any(1), np.take_along_axis(best, first[:, None], 1)[:, 0], 0)
        total /= points
    return np.where(positives > 0, total, np.nan)


def mean_ap(found: Matches, weights: np.ndarray | None = None, points: int | None = None, least: int = 1) -> np.ndarray:
    """Returns the mean average precision over classes `[d]`, for d weightings of the images `[d, images]` (by default one, all equal).

    Classes with fewer than `least` objects in the test are left out. Each weighting also leaves out the classes of which it has no object.
    """
    by_class = class_ap(found, weights, points)
    by_class[:, found.positives.sum(0) < least] = np.nan
    known = ~np.isnan(by_class)
    return np.where(known.any(1), np.where(known, by_class, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def class_ap(found: Matches, weights: np.ndarray | None = None, points: int | None = None) -> np.ndarray:
    """Returns the average precision of each class `[d, classes]`; NaN for a class without an object."""
    images, classes = found.positives.shape
    weights = np.ones((1, images), dtype=np.int64) if weights is None else weights
    out = np.full((len(weights), classes), np.nan)
    positives = weights @ found.positives.astype(np.int64)
    for c in range(classes):
        mine = np.flatnonzero(found.label == c)
        mine = mine[np.argsort(-found.score[mine], kind="stable")]
        times = weights[:, found.image[mine]]
        hit = found.hit[mine]
        out[:, c] = average_precision(times * (hit == TRUE), times * (hit == FALSE), positives[:, c], points)
    return out


def bootstrap(images: int, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Returns how often each image is drawn in each of `draws` samples with replacement `[draws, images]`."""
    generator = np.random.default_rng(seed)
    return (
        generator.multinomial(images, np.full(images, 1 / max(images, 1)), draws)
        if images
        else np.zeros((draws, 0), int)
    )


def interval(
    found: Matches, points: int | None = None, least: int = 1, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Returns the 2.5 % and 97.5 % quantiles of the mean average precision over samples of the images."""
    weights = bootstrap(len(found.positives)) if weights is None else weights
    step = max(1, _CHUNK // max(len(found.image), 1))
    values = [mean_ap(found, weights[at : at + step], points, least) for at in range(0, len(weights), step)]
    values = np.concatenate(values)
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)
