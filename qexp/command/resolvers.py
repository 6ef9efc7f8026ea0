"""Values that `conf/model/timm.yaml`, `torchvision.yaml` and `import.yaml` compute from a network's name."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from qexp.errors import QexpError


def _published(library: str, name: str | None, weights: str | None, key: str) -> Any:
    from qexp.models.published import preprocessing  # imported here, so that --help and --cfg start fast

    value = preprocessing(library, name, weights)[key]
    # as a node, so that others can refer to its entries: ${model.input_size.1}
    return OmegaConf.create(value) if isinstance(value, list) else value


def _last_name(target: str | None) -> str | None:
    if not target:
        raise QexpError("model=import is not enough; name the class too, such as model.target=mypkg.nets.Net")
    return str(target).rpartition(".")[2]


def register() -> None:
    """Registers `${published:LIBRARY,NAME,WEIGHTS,KEY}` (a value of a published network's preprocessing) and `${last_name:a.b.C}` (`C`)."""
    OmegaConf.register_new_resolver("published", _published, replace=True)
    OmegaConf.register_new_resolver("last_name", _last_name, replace=True)
