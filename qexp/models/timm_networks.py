"""timm's networks, built by name without a download."""

from __future__ import annotations

from typing import Any

from torch import nn

from qexp.errors import QexpError
from qexp.models.starting import IMAGENET, start_from
from qexp.models.timm_weights import timm, timm_config


def timm_model(architecture: str, num_classes: int = IMAGENET, start: str | None = None, **options: Any) -> nn.Module:
    """Returns the timm network of a name, randomly initialised; `qexp.models.weights` loads its weights.

    Args:
        architecture: A name of `timm.list_models()`, with or without the tag of its weights: `resnet18.a1_in1k`, `resnet18`.
        num_classes: Outputs of the classifier.
        start: Weights for 1,000 classes from which training starts, as `weights` names them; the classifier stays random.
        options: Arguments of timm's constructor (`in_chans`, `drop_path_rate`, `img_size`, ...).

    Raises:
        QexpError: timm is not installed, has no such network, or its constructor refuses an option.
    """
    timm_config(architecture)
    try:
        model = timm().create_model(architecture, pretrained=False, num_classes=num_classes, **options)
    except TypeError as error:
        raise QexpError(
            f"model.net of timm's {architecture}: {error}; its arguments are those of timm.create_model"
        ) from error
    model.timm_name = architecture
    if start is not None:
        start_from(model, timm_model(architecture, **options), start)
    return model
