"""Types of the root keys: one dataclass, so that `seed=three` is refused; for the groups the constructors are the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Root:
    """The keys that stand at the root of a configuration; what each means is said in conf/config.yaml."""

    dataset: Any = MISSING
    model: Any = MISSING
    quant: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = MISSING
    passes: Any = field(default_factory=dict)
    search: Any = None
    layer_wbit: Any = 8
    layer_abit: Any = 8
    ends_bit: int | None = 8
    plan: str | None = None
    weights: str | None = None
    bn: str = "fold"
    n_calibrate: int = 512
    max_samples: int | None = None
    kernels: str = "auto"
    rounding: str = "float"
    verify: int = 0
    export: str | None = None
    accumulator: Any = None
    seed: int = 0
    study: str = "default"
    runs_dir: str = "runs"
    force: bool = False


def register() -> None:
    """Makes the root's types known to Hydra, as `schema`."""
    ConfigStore.instance().store(name="schema", node=Root)
