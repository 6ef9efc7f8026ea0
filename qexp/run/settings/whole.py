"""All settings of one run, read once from the composed configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qexp.errors import QexpError
from qexp.run.settings.checks import (
    Spec,
    choice,
    listed,
    mapping,
    none_or,
    specification,
    text,
    truth,
    whole,
)
from qexp.run.settings.method import Integers, Method, Widths
from qexp.run.settings.network import Data, Network, model_name
from qexp.run.settings.schedule import Schedule
from qexp.run.settings.trainer import TrainerOptions
from qexp.system.objects import TARGET

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text in a tenth of the time
# what Lightning's loggers import, by class; any one of them is enough
_PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow",),
    "WandbLogger": ("wandb",),
}


@dataclass(frozen=True)
class Settings:
    """All settings of one run."""

    network: Network
    data: Data
    schedule: Schedule
    method: Method
    trainer: TrainerOptions
    widths: Widths = field(default_factory=Widths)
    integers: Integers = field(default_factory=Integers)
    callbacks: Mapping[str, Spec] = field(default_factory=dict)
    loggers: Mapping[str, Spec] = field(default_factory=dict)  # trackers, which change no result
    passes: Mapping[str, Spec] = field(default_factory=dict)  # added to the method's own
    search: Spec | None = None
    weights: str | None = None  # a file, a torchvision name, URL#sha256=..., a run folder; None trains in float first
    bn: str = "fold"  # fold | keep | freeze
    n_calibrate: int = 512  # calibration images
    max_samples: int | None = None  # test images; None is all
    kernels: str = "auto"  # auto | cuda | cpp | reference
    seed: int = 0
    study: str = "default"
    runs_dir: Path = Path("runs")
    force: bool = False  # run again a point that is finished
    in_sweep: bool = False  # one of several points: it prints less
    # The whole configuration as plain values, for names and the record.
    resolved: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Settings:
        """Returns the settings of a configuration of plain values.

        Raises:
            QexpError: A value is not allowed; the message names its key and the allowed values.
        """
        seed = whole(
            cfg.get("seed", 0), "seed", 0, 2**32 - 1
        )  # this and the widths first: other keys take their values
        widths = Widths.of(cfg)
        schedule = Schedule.of(cfg.get("schedule"))
        return cls(
            network=Network.of(cfg.get("model"), "model"),
            data=Data.of(cfg.get("dataset")),
            schedule=schedule,
            method=Method.of(cfg.get("quant")),
            trainer=TrainerOptions.of(cfg.get("trainer")),
            widths=widths,
            integers=_integers(cfg),
            callbacks=_chosen(cfg.get("callbacks"), "callbacks"),
            loggers=_loggers(cfg.get("logger")),
            passes=_chosen(cfg.get("passes"), "passes"),
            search=none_or(specification, cfg.get("search"), "search"),
            weights=none_or(text, cfg.get("weights"), "weights"),
            bn=choice(cfg.get("bn", "fold"), "bn", ("fold", "keep", "freeze")),
            n_calibrate=whole(cfg.get("n_calibrate", 512), "n_calibrate", 0),
            max_samples=none_or(whole, cfg.get("max_samples"), "max_samples", 1),
            kernels=choice(cfg.get("kernels", "auto"), "kernels", ("auto", "cuda", "cpp", "reference")),
            seed=seed,
            study=_study(cfg.get("study", "default")),
            runs_dir=Path(text(cfg.get("runs_dir", "runs"), "runs_dir")),
            force=truth(cfg.get("force", False), "force"),
            resolved=cfg,
        )

    @property
    def yaml(self) -> str:
        """The whole configuration as text."""
        return yaml.dump(dict(self.resolved), Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=1000)

    @property
    def trains(self) -> bool:
        """Whether this point trains the network it evaluates; a float schedule without weights has trained it already."""
        return self.schedule.learns and (not self.schedule.is_float or self.weights is not None)

    @property
    def all_passes(self) -> dict[str, Spec]:
        """All passes by name, in the order they run: the method's, then the added ones; a name in both keeps its first position."""
        return {} if self.schedule.is_float else {**self.method.passes, **self.passes}

    @property
    def float_schedule(self) -> Schedule:
        """The schedule that trains the float network where no weights are given."""
        if self.schedule.is_float:
            return self.schedule
        if self.schedule.pretrain is None:
            raise QexpError(
                "schedule.pretrain is missing; give the schedule that trains the float network, or weights=FILE"
            )
        return self.schedule.pretrain

    @property
    def shared(self) -> Path:
        """The folder of the files that runs share: float networks, their scores, calibration statistics."""
        return self.runs_dir / ".cache"


def read(cfg: DictConfig, in_sweep: bool = False) -> Settings:
    """Returns the settings of a composed configuration.

    Args:
        cfg: The configuration that Hydra composed.
        in_sweep: Whether the run is one of several points.

    Raises:
        QexpError: A value is not allowed, or a `${...}` names a key that does not exist.
    """
    try:
        return replace(
            Settings.of(OmegaConf.to_container(_with_choices(_with_name(cfg)), resolve=True)), in_sweep=in_sweep
        )
    except OmegaConfBaseException as error:
        if (mistake := _behind(error)) is not None:
            raise mistake from None
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise QexpError(f"{key}{str(error).splitlines()[0]}; see --cfg job for the whole configuration") from None


def _behind(error: BaseException) -> QexpError | None:
    """Returns the user's mistake behind an error of OmegaConf, where a value is computed from a name that does not exist."""
    while error is not None:
        if isinstance(error, QexpError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _with_name(cfg: DictConfig) -> DictConfig:
    """Returns a configuration whose model has a name, by default that of the class or function that builds it; `study` uses it."""
    model = cfg.get("model")
    if not OmegaConf.is_dict(model) or "name" in model or not OmegaConf.is_dict(model.get("net")):
        return cfg
    cfg = cfg.copy()
    with open_dict(cfg.model):
        cfg.model.name = model_name(cfg.model.net)
    return cfg


def _with_choices(cfg: DictConfig) -> DictConfig:
    """Returns a configuration in which the choices of `optimizer=` and `scheduler=` replace the schedule's own, as a whole.

    They replace those of the training that the schedule names, or of `pretrain` where the schedule itself does not train (ptq). The
    result equals the configuration of a run that spells out the two below the schedule.
    """
    groups = [key for key in ("optimizer", "scheduler") if cfg.get(key) is not None]
    if not groups:
        return cfg
    cfg = cfg.copy()
    trained = cfg.schedule if cfg.schedule.get("optimizer") is not None else cfg.schedule.get("pretrain")
    for key in groups:
        # resolved now, since it may refer to the value it replaces
        chosen = OmegaConf.to_container(cfg[key], resolve=True)
        with open_dict(cfg):
            if trained is not None:
                trained[key] = chosen
                if "epochs" in chosen and chosen["epochs"] is None:
                    trained[key].epochs = trained.epochs
            cfg[key] = None
    return cfg


def _integers(cfg: Mapping[str, Any]) -> Integers:
    widths = cfg.get("accumulator")
    widths = [] if widths is None else [widths] if isinstance(widths, int) else listed(widths, "accumulator")
    rounding = choice(cfg.get("rounding", "float"), "rounding", ("float", "integer"))
    evaluate = choice(cfg.get("evaluate", "float"), "evaluate", ("float", "codes"))
    if rounding == "integer" and evaluate == "codes":
        raise QexpError("evaluate=codes is not allowed with rounding=integer; leave out one of them")
    return Integers(
        rounding=rounding,
        evaluate=evaluate,
        verify=whole(cfg.get("verify", 0), "verify", 0),
        accumulator=[whole(width, "accumulator", 2, 64) for width in widths],
        export=none_or(text, cfg.get("export"), "export"),
    )


def _chosen(node: Any, key: str) -> dict[str, Spec]:
    """Returns the specifications of a group whose entries may be null."""
    return {name: specification(spec, f"{key}.{name}") for name, spec in mapping(node or {}, key).items() if spec}


def _loggers(node: Any) -> dict[str, Spec]:
    """Returns the trackers; raises for one whose package is not installed, before anything runs."""
    found = _chosen(node, "logger")
    for name, spec in found.items():
        packages = _PACKAGES.get(str(spec[TARGET]).rpartition(".")[2], ())
        if packages and not any(find_spec(package) for package in packages):
            raise QexpError(f"logger={name} needs {packages[0]}: pip install {packages[0]}")
    return found


def _study(value: Any) -> str:
    name = text(value, "study")
    longest = max(len(part.encode()) for part in Path(name).parts or ("",))
    if not longest or longest > 255:
        raise QexpError(
            f"study={name[:40]}{'...' if len(name) > 40 else ''} is not allowed; use a name of 1 to 255 bytes"
        )
    return name
