"""Types of the root keys: one dataclass, so that `seed=three` is refused; for the groups the constructors are the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict


@dataclass
class Root:
    """The keys that stand at the root of a configuration; what each means is said in conf/config.yaml."""

    dataset: Any = MISSING
    model: Any = MISSING
    quant: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = MISSING
    optimizer: Any = None
    scheduler: Any = None
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


def settle_training(cfg: DictConfig) -> None:
    """Puts what `optimizer=` and `scheduler=` choose in the place of the schedule's own, whole, in place.

    It is of the training that the schedule names; of `pretrain` where the schedule itself does not train (ptq). Afterwards the
    configuration says the same as one that spells the two out below the schedule.
    """
    trained = cfg.schedule if cfg.schedule.get("optimizer") is not None else cfg.schedule.get("pretrain")
    for key in ("optimizer", "scheduler"):
        if cfg.get(key) is None:
            continue
        chosen = OmegaConf.to_container(cfg[key], resolve=True)  # now: it may speak of what it replaces
        with open_dict(cfg):
            if trained is not None:
                trained[key] = chosen
                if "epochs" in chosen and chosen["epochs"] is None:
                    trained[key].epochs = trained.epochs
            cfg[key] = None
