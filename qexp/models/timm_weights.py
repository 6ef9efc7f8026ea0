"""What timm says of a network's published weights: their name, size, normalisation and address."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from qexp.errors import QexpError, near


def timm_config(name: str) -> Any:
    """Returns timm's description of a network's weights (`PretrainedCfg`): their size, normalisation and address.

    Raises:
        QexpError: timm is not installed, or has no such network; the message names the nearest ones.
    """
    package = timm()
    family, _, tag = name.partition(".")
    if not package.is_model(family):
        raise QexpError(
            f"model.name={name} is not allowed; timm has no network {family!r}{near(family, package.list_models())}; "
            "timm.list_models() lists all"
        )
    tags = [full.partition(".")[2] for full in package.list_pretrained(f"{family}.*")]
    if tag and tag not in tags:
        raise QexpError(
            f"model.name={name} is not allowed; timm's {family} has no weights {tag!r}{near(tag, tags, prefix=f'{family}.')}; "
            f"it has {', '.join(tags) or 'none'}"
        )
    found = package.get_pretrained_cfg(name)
    if found is None:  # a network without published weights
        found = package.models.PretrainedCfg(mean=(0.5,) * 3, std=(0.5,) * 3)
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


def timm() -> ModuleType:
    """Returns the package.

    Raises:
        QexpError: It is not installed.
    """
    try:
        import timm as package  # seconds to import
    except ImportError:
        raise QexpError("model=timm needs timm: pip install timm") from None
    return package
