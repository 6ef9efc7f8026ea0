"""Data sets, loaded once a process: every point of a sweep shares them."""

from __future__ import annotations

import json

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule

_loaded: dict[str, LightningDataModule] = {}


def load_data(node: DictConfig) -> LightningDataModule:
    """Returns the data module of a configuration node, the same object for the same node."""
    key = json.dumps(OmegaConf.to_container(node, resolve=True), sort_keys=True, default=str)
    if key not in _loaded:
        data = instantiate(node)
        data.setup()
        _loaded.clear()  # one set at a time: the next point of a sweep most likely uses the same
        _loaded[key] = data
    return _loaded[key]
