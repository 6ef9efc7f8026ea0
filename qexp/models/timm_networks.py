"""timm's networks, built by name without a download."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from qexp.errors import QexpError, near


def timm_model(architecture: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    """Returns the timm network of a name, randomly initialised; `qexp.models.weights` loads its weights.

    Args:
        architecture: A name of `timm.list_models()`, with or without the tag of its weights: `resnet18.a1_in1k`, `resnet18`.
        num_classes: Outputs of the classifier.
        options: Arguments of timm's constructor (`in_chans`, `drop_path_rate`, `img_size`, ...).

    Raises:
        QexpError: timm is not installed, has no such network, or its constructor refuses an option.
    """
    timm_config(architecture)
    try:
        model = _timm().create_model(architecture, pretrained=False, num_classes=num_classes, **options)
    except TypeError as error:
        raise QexpError(
            f"model.net of timm's {architecture}: {error}; its arguments are those of timm.create_model"
        ) from error
    model.timm_name = architecture
    return model


def timm_config(name: str) -> Any:
    """Returns timm's description of a network's weights (`PretrainedCfg`): their size, normalisation and address.

    Raises:
        QexpError: timm is not installed, or has no such network; the message names the nearest ones.
    """
    timm = _timm()
    family, _, tag = name.partition(".")
    if not timm.is_model(family):
        raise QexpError(
            f"model.name={name} is not allowed; timm has no network {family!r}{near(family, timm.list_models())}; "
            "timm.list_models() lists all"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{family}.*")]
    if tag and tag not in tags:
        raise QexpError(
            f"model.name={name} is not allowed; timm's {family} has no weights {tag!r}{near(tag, tags, prefix=f'{family}.')}; "
            f"it has {', '.join(tags) or 'none'}"
        )
    found = timm.get_pretrained_cfg(name)
    if found is None:  # a network without published weights
        found = timm.models.PretrainedCfg(mean=(0.5,) * 3, std=(0.5,) * 3)
    return found


def timm_address(name: str) -> tuple[str, str]:
    """Returns the address of the weights of a timm network, and the name of the file that keeps them.

    Raises:
        QexpError: timm publishes no weights for it.
    """
    found = timm_config(name)
    if found.hf_hub_id:
        file = found.hf_hub_filename or "model.safetensors"
        return (
            f"https://huggingface.co/{found.hf_hub_id}/resolve/main/{file}",
            f"{found.hf_hub_id.split('/')[-1]}-{file}",
        )
    if found.url:
        return found.url, found.url.rsplit("/", 1)[-1]
    raise QexpError(f"weights=DEFAULT: timm publishes no weights of {name}; use a file, or weights=null")


def _timm() -> ModuleType:
    try:
        import timm  # seconds to import
    except ImportError:
        raise QexpError("model=timm needs timm: pip install timm") from None
    return timm
