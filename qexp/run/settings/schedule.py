"""Settings of training: schedule, optimizer options and distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexp.errors import QexpError
from qexp.run.settings.checks import (
    Spec,
    choice,
    listed,
    mapping,
    none_or,
    number,
    specification,
    text,
    truth,
    whole,
)
from qexp.run.settings.network import Network

KINDS = ("float", "ptq", "qat")


@dataclass(frozen=True)
class Distill:
    """How a training learns from a float network; off while `logits` and `features` are 0."""

    logits: float = 0.0  # weight of the teacher's softened class probabilities
    temperature: float = 4.0  # softens the probabilities
    features: float = 0.0  # weight of the relative squared distance between outputs of layers
    layers: Sequence[str] | None = (
        None  # modules to compare; None takes the last one of each of the model's groups, without the classifier's group
    )
    labels: float = 1.0  # weight of the labels
    teacher: Network | None = None  # None is the run's own float network

    @property
    def is_on(self) -> bool:
        return bool(self.logits or self.features)

    @classmethod
    def of(cls, node: Any, key: str) -> Distill:
        """Returns the distillation settings of a `distill` node."""
        node = mapping(node or {}, key)
        teacher, layers = node.get("teacher"), node.get("layers")
        return cls(
            logits=number(node.get("logits", 0.0), f"{key}.logits", least=0),
            temperature=number(node.get("temperature", 4.0), f"{key}.temperature", above=0),
            features=number(node.get("features", 0.0), f"{key}.features", least=0),
            layers=None if layers is None else [layers] if isinstance(layers, str) else listed(layers, f"{key}.layers"),
            labels=number(node.get("labels", 1.0), f"{key}.labels", least=0),
            teacher=Network.of(teacher, f"{key}.teacher") if teacher else None,
        )


@dataclass(frozen=True)
class Schedule:
    """The training of a network: none (`ptq`), with quantizers (`qat`) or without quantizers (`float`)."""

    kind: str  # float | ptq | qat
    name: str  # label in tables
    from_scratch: bool = False  # True for a qat schedule that starts from random weights
    epochs: int = 0
    max_steps: int = -1  # greatest number of optimizer steps; -1 is no limit
    label_smoothing: float = 0.0
    optimizer: Spec | None = None
    scheduler: Spec | None = None
    gradient_clip: float | None = None  # greatest norm of a step's gradient
    quantizer: Mapping[str, Any] = field(default_factory=dict)  # optimizer options of scales and clips
    distill: Distill = field(default_factory=Distill)
    ema: float | None = None  # decay of the average of weights
    oscillation: Mapping[str, Any] | None = None
    sam: Mapping[str, Any] | None = None  # sharpness-aware steps: radius and variant
    two_step: float | None = None  # share of the epochs that train with float weights first
    progressive: Any = None  # widths of the stages before the recipe's own widths
    pretrain: Schedule | None = None  # trains the float network where no weights are given
    options: Mapping[str, Any] = field(default_factory=dict)  # every key as written, for keys of a task's own

    @property
    def is_float(self) -> bool:
        """Whether the run quantizes nothing."""
        return self.kind == "float"

    @property
    def learns(self) -> bool:
        """Whether the schedule trains at all."""
        return self.optimizer is not None and self.epochs > 0

    @classmethod
    def of(cls, node: Any, key: str = "schedule") -> Schedule:
        """Returns the schedule of a configuration node."""
        node = mapping(node, key)
        kind = choice(node.get("kind"), f"{key}.kind", KINDS)
        epochs = whole(node.get("epochs", 0), f"{key}.epochs", 0)
        optimizer = node.get("optimizer")
        if optimizer is None and epochs:
            raise QexpError(
                f"{key}.optimizer=null is not allowed with {key}.epochs={epochs}; name an optimizer, or set {key}.epochs=0"
            )
        steps = whole(node.get("max_steps", -1), f"{key}.max_steps", -1)
        if steps == 0:
            raise QexpError(f"{key}.max_steps=0 is not allowed; use a number from 1, or -1 for no limit")
        pretrain = node.get("pretrain") if kind != "float" else None  # float training needs no float training before it
        return cls(
            kind=kind,
            name=text(node.get("name"), f"{key}.name"),
            from_scratch=truth(node.get("from_scratch", False), f"{key}.from_scratch"),
            epochs=epochs,
            max_steps=steps,
            label_smoothing=number(node.get("label_smoothing", 0.0), f"{key}.label_smoothing", least=0, below=1),
            optimizer=_optimizer(optimizer, f"{key}.optimizer"),
            scheduler=none_or(specification, node.get("scheduler"), f"{key}.scheduler"),
            gradient_clip=none_or(number, node.get("gradient_clip"), f"{key}.gradient_clip", above=0),
            quantizer=_optimizer_options(node.get("quantizer") or {}, f"{key}.quantizer"),
            distill=Distill.of(node.get("distill"), f"{key}.distill"),
            ema=none_or(number, node.get("ema"), f"{key}.ema", above=0, below=1),
            oscillation=none_or(mapping, node.get("oscillation"), f"{key}.oscillation"),
            sam=none_or(mapping, node.get("sam"), f"{key}.sam"),
            two_step=none_or(number, node.get("two_step"), f"{key}.two_step", above=0, below=1),
            progressive=node.get("progressive"),
            pretrain=cls.of(pretrain, f"{key}.pretrain") if pretrain else None,
            options=node,
        )


def _optimizer(node: Any, key: str) -> Spec | None:
    return None if node is None else _optimizer_options(specification(node, key), key)


def _optimizer_options(node: Any, key: str) -> Mapping[str, Any]:
    """Returns an optimizer's options, after a check of those that all optimizers share."""
    node = mapping(node, key)
    for name in ("lr", "weight_decay"):
        if node.get(name) is not None:
            number(node[name], f"{key}.{name}", least=0)
    if node.get("momentum") is not None:
        number(node["momentum"], f"{key}.momentum", least=0, below=1)
    return node
