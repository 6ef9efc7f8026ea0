"""The root keys as one dataclass, so that Hydra refuses unknown keys. Types and bounds of values are in `qexp.run.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from qexp.command import commands, listing, resolvers, search_path, widths


@dataclass
class Root:
    """The keys that stand at the root of a configuration; conf/config.yaml explains each."""

    dataset: Any = MISSING
    model: Any = MISSING
    quant: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = MISSING
    logger: Any = field(default_factory=dict)
    optimizer: Any = None
    scheduler: Any = None
    passes: Any = field(default_factory=dict)
    search: Any = None
    layer_wbit: Any = 8
    layer_abit: Any = 8
    ends_bit: Any = 8
    plan: Any = None
    weights: Any = None
    bn: Any = "fold"
    n_calibrate: Any = 512
    max_samples: Any = None
    kernels: Any = "auto"
    rounding: Any = "float"
    evaluate: Any = "float"
    verify: Any = 0
    export: Any = None
    accumulator: Any = None
    seed: Any = 0
    study: Any = "default"
    runs_dir: Any = "runs"
    force: Any = False


def register() -> None:
    """Registers with Hydra the types of the root (`schema`), pairs of widths as choices of `bits=`, the user's folders and help texts."""
    ConfigStore.instance().store(name="schema", node=Root)
    widths.register()
    listing.register()
    resolvers.register()
    commands.register()
    search_path.register()
