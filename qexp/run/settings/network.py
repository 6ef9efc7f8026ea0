"""Settings of the network, and of the images with the task that scores the network's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexp.models.key_maps import parsed
from qexp.run.settings.checks import (
    Spec,
    listed,
    mapping,
    none_or,
    number,
    refusal,
    specification,
    text,
    whole,
)
from qexp.system.objects import TARGET

# the task of a data set without `task`
CLASSES = {TARGET: "qexp.tasks.classification.Classification", "_partial_": True}
CALIBRATION_BATCH = (
    32  # images per batch where the data set gives no number; averaged and moving-average ranges depend on it
)


@dataclass(frozen=True)
class Network:
    """The network: the class or function that builds it, and the names of its parts."""

    name: str  # label in tables and on pages
    net: Spec  # specification that builds the module
    groups: Sequence[Any] | None = None  # module names that lists of widths count; an entry may hold several
    first: Any = None  # name of the first layer; None takes the first one in the graph
    last: Any = None
    input_size: Sequence[int] | None = None  # [C, H, W] that the network takes
    preprocessing: Mapping[str, Any] | None = None  # mean, std and more, as in the training of its weights
    key_map: Mapping[str, str] = field(default_factory=dict)  # names in a weights file -> names in the module
    weights: str | None = None  # weights of a teacher; the run's own are in `Settings.weights`
    definition: str | None = None  # a file that describes the network (Darknet's .cfg)

    @classmethod
    def of(cls, node: Any, key: str) -> Network:
        """Returns the network that a `model` node describes."""
        node = mapping(node, key)
        net = specification(node.get("net"), f"{key}.net")
        return cls(
            name=text(node.get("name", model_name(net)), f"{key}.name"),
            net=net,
            groups=none_or(listed, node.get("groups"), f"{key}.groups"),
            first=none_or(_layers, node.get("first"), f"{key}.first"),
            last=none_or(_layers, node.get("last"), f"{key}.last"),
            input_size=none_or(listed, node.get("input_size"), f"{key}.input_size"),
            preprocessing=none_or(mapping, node.get("preprocessing"), f"{key}.preprocessing"),
            key_map=parsed(found)
            if isinstance(found := node.get("key_map"), str)
            else mapping(found or {}, f"{key}.key_map"),
            weights=none_or(text, node.get("weights"), f"{key}.weights"),
            definition=none_or(text, node.get("cfg"), f"{key}.cfg"),
        )


def model_name(net: Mapping[str, Any]) -> str:
    """Returns the default name of a network: its name in torchvision, or its class."""
    return str(net.get("name") or str(net.get(TARGET)).rpartition(".")[2])


@dataclass(frozen=True)
class Data:
    """The images, and the task that scores the network's outputs."""

    name: str
    module: Spec  # specification that builds the data module
    num_classes: int
    task: Spec  # specification that builds the LightningModule
    calibration_batch: int = CALIBRATION_BATCH  # images per calibration batch

    @classmethod
    def of(cls, node: Any) -> Data:
        """Returns the data settings of a `dataset` node."""
        node = mapping(node, "dataset")
        classes = whole(node.get("num_classes"), "dataset.num_classes", 1)
        batch = node.get("calibration_batch", CALIBRATION_BATCH)
        module = specification(node.get("data"), "dataset.data")
        _check_images(module)
        return cls(
            name=text(node.get("name"), "dataset.name"),
            module=module,
            num_classes=classes,
            task=specification(node["task"], "dataset.task")
            if node.get("task")
            else {**CLASSES, "num_classes": classes},
            calibration_batch=whole(batch, "dataset.calibration_batch", 1),
        )


def _layers(value: Any, key: str) -> Any:
    """Returns the name of a layer, or several."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise refusal(key, value, "the name of a layer, a list of names, or null to find it in the graph")
    return value


def _check_images(module: Spec) -> None:
    """Raises if an option that all data modules share has a wrong value."""
    key = "dataset.data"
    for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("calibration_size", 0), ("workers", 0)):
        if module.get(name) is not None:
            whole(module[name], f"{key}.{name}", least)
    none_or(whole, module.get("max_samples"), f"{key}.max_samples", 1)
    none_or(whole, module.get("seed"), f"{key}.seed", 0, 2**32 - 1)
    size = module.get("size")
    for side in size if isinstance(size, list | tuple) else [size]:
        none_or(whole, side, f"{key}.size", 1)
    for value in listed(module.get("std") or [], f"{key}.std"):
        number(value, f"{key}.std", above=0)
    for value in listed(module.get("mean") or [], f"{key}.mean"):
        number(value, f"{key}.mean")
    if module.get("max_value") is not None:
        number(module["max_value"], f"{key}.max_value", above=0)
    augment = module.get("augment")
    if isinstance(augment, Mapping) and augment.get("padding") is not None:
        whole(augment["padding"], f"{key}.augment.padding", 0)
