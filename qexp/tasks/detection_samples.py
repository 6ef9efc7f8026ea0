"""Selects a few test images with their detections, for the page of a detection run."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from qexp.tasks.base import Score
from qexp.tasks.mean_ap import TRUE

SHOWN, SIDE, CONFIDENT = 6, 400, 0.3  # images on the page, their longer side in pixels, the least score drawn


def samples(score: Score, reference: Score | None, data: Any) -> dict[str, Any]:
    """Returns the content of `detections.json`: precision by class, and the images on which float and quantized differ most.

    Args:
        score: The score of the quantized network.
        reference: The score of the float network, where there is one.
        data: The detection set.
    """
    both = {"float": reference, "quantized": score}
    kept = {name: one for name, one in both.items() if one is not None and one.n == score.n}
    pictures = data.splits["test"][: score.n]
    images = []
    for place in sorted(_telling(kept, score.n)):
        picture = pictures[place]
        small = data.decode(picture)
        small.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        images.append(
            {
                "name": picture.name,
                "jpeg": base64.b64encode(file.getvalue()).decode(),
                "width": small.width,
                "height": small.height,
                "objects": picture.objects.boxes.tolist(),
                **{name: _found(one, place) for name, one in kept.items()},
            }
        )
    about = (
        f"{score.n} test images; mAP (11 points) {_percent(kept.get('float'))} in float, {_percent(score)} quantized. Detections scored "
        f"{CONFIDENT} or more, on the images where the two networks differ most."
    )
    return {
        "title": "Detections, float and quantized",
        "about": about,
        "names": list(data.class_names),
        "images": images,
    } | {"classes": _classes(kept, data.class_names)}


def _percent(score: Score | None) -> str:
    return "–" if score is None or math.isnan(score.value) else f"{100 * score.value:.2f} %"


def _telling(kept: dict[str, Score], n: int) -> list[int]:
    """Returns the images whose numbers of right and wrong confident detections differ most; among equal ones, the earlier ones."""
    counts = []
    for score in kept.values():
        o = score.outcomes
        sure = o["score"] >= CONFIDENT
        counts.append([np.bincount(o["image"][sure & (o["hit"] == hit)], minlength=n) for hit in (TRUE, 0)])
    change = np.abs(np.array(counts[0]) - np.array(counts[-1])).sum(0)
    return np.argsort(-change, kind="stable")[:SHOWN].tolist()


def _found(score: Score, place: int) -> list[list[Any]]:
    """Returns label, score, hit and the four corners of each confident detection on an image, best last (drawn on top)."""
    o = score.outcomes
    at = np.flatnonzero((o["image"] == place) & (o["score"] >= CONFIDENT))[::-1]
    return [
        [
            int(o["label"][i]),
            round(float(o["score"][i]), 3),
            int(o["hit"][i]),
            *(round(float(v), 4) for v in o["box"][i]),
        ]
        for i in at
    ]


def _classes(kept: dict[str, Score], names: tuple[str, ...]) -> list[list[Any]]:
    """Returns name, number of objects and average precision in percent (float, quantized) of each class in the test."""
    positives = next(iter(kept.values())).outcomes["positives"].sum(0)

    def precision(which: str, c: int) -> float | None:
        return round(100 * float(kept[which].outcomes["class_ap"][c]), 2) if which in kept else None

    return [
        [name, int(positives[c]), precision("float", c), precision("quantized", c)]
        for c, name in enumerate(names)
        if positives[c]
    ]
