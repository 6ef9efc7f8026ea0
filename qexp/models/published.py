"""How published weights want their images: size, crop, interpolation, mean and standard deviation, read off the weights' own metadata."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

from qexp.errors import QexpError, near
from qexp.models.timm_weights import timm_config

LIBRARIES = ("torchvision", "timm")
# torchvision's weights of these networks take images in -1..1; its own builder changes ImageNet's normalisation inside the network
_HALVES = ("googlenet", "inception_v3")


def preprocessing(library: str, name: str | None, weights: str | None = None) -> dict[str, Any]:
    """Returns how the images of a published network are prepared.

    Args:
        library: `torchvision` or `timm`.
        name: Name of the network in that library.
        weights: Name of torchvision's weights (`IMAGENET1K_V2`); anything else (a file, None) stands for the library's default ones.

    Returns:
        `input_size` `[C, H, W]`, `mean`, `std` (one number per channel, of pixels in 0..1), `resize` (the shorter side, or `[H, W]` to
        squash to, before a crop of `input_size`) and `interpolation`.

    Raises:
        QexpError: There is no name, or the library has no such network.
    """
    if not name:
        example = "resnet18.a1_in1k" if library == "timm" else "resnet18"
        raise QexpError(f"model={library} is not enough; name the network too, such as model.name={example}")
    return dict(_of_timm(name) if library == "timm" else _of_torchvision(name, str(weights)))


@cache
def _of_torchvision(name: str, weights: str) -> dict[str, Any]:
    from torchvision import models  # seconds to import

    known = models.list_models(module=models)
    if name not in known:
        raise QexpError(
            f"model.name={name} is not allowed; torchvision has no such classifier{near(name, known)}; "
            "torchvision.models.list_models() lists all"
        )
    every = models.get_model_weights(name)
    short = weights.rpartition(".")[2] if re.fullmatch(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*", weights) else ""
    prepared = every[short if short in every.__members__ else "DEFAULT"].transforms()
    return {
        "input_size": [3, *(prepared.crop_size * 2)[:2]],
        "mean": [0.5] * 3 if name in _HALVES else list(prepared.mean),
        "std": [0.5] * 3 if name in _HALVES else list(prepared.std),
        "resize": prepared.resize_size[0],
        "interpolation": prepared.interpolation.value,
    }


@cache
def _of_timm(name: str) -> dict[str, Any]:
    """Returns what timm's evaluation does: a resize to size / crop_pct, rounded down, and a crop from the middle."""
    found = timm_config(name)
    size = [math.floor(side / found.crop_pct) for side in found.input_size[1:]]
    return {
        "input_size": list(found.input_size),
        "mean": list(found.mean),
        "std": list(found.std),
        "resize": size if found.crop_mode == "squash" else size[0],
        "interpolation": found.interpolation,
    }
