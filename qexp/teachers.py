"""The teacher of a distilled training: the run's own float network, or another model with weights of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pydoc import locate
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qexp import training
from qexp.data.tensors import Normalize
from qexp.errors import QexpError
from qexp.floats import cache_dir
from qexp.graph import facts
from qexp.tasks.base import evaluated
from qexp.tasks.classification import Classification
from qexp.tasks.distillation import Distillation
from qexp.weights import load_weights

log = logging.getLogger(__name__)


class Renormalized(nn.Module):
    """A network that is given images normalised by `given` and sees them as it was trained, normalised by `own`; sizes stay."""

    def __init__(self, network: nn.Module, given: Normalize, own: Normalize) -> None:
        super().__init__()
        self.network = network
        self.flips = given.channel_order != own.channel_order
        mean, std, own_mean, own_std = (
            torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (given.mean, given.std, own.mean, own.std)
        )
        if self.flips:
            mean, std = mean.flip(0), std.flip(0)
        unit = given.max_value / own.max_value
        self.register_buffer("gain", std * unit / own_std)
        self.register_buffer("shift", (mean * unit - own_mean) / own_std)

    def get_submodule(self, target: str) -> nn.Module:
        return self.network.get_submodule(target)

    def named_modules(self, *args, **options):
        return self.network.named_modules(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x.flip(-3) if self.flips else x) * self.gain + self.shift)


def distillation(cfg: DictConfig, data: LightningDataModule, model: nn.Module, is_float: bool) -> Distillation | None:
    """Returns what the schedule's `distill` asks for, checked against the network; None where it is off.

    Args:
        cfg: The configuration.
        data: Its images.
        model: The network that will learn, before quantizers are attached.
        is_float: Whether it holds float weights worth learning from (a training from random weights has none).
    """
    asked = cfg.schedule.get("distill")
    if not asked or not (asked.logits or asked.features):
        return None
    if asked.get("teacher"):
        teacher = _other(asked.teacher, cfg, data)
    elif is_float:
        teacher = copy.deepcopy(model)
    else:
        raise QexpError(
            f"schedule.distill: schedule={cfg.schedule.name} starts from random weights, so there is no float network to learn "
            "from; name one: "
            "model@schedule.distill.teacher=MODEL schedule.distill.teacher.weights=FILE"
        )
    make = locate(training.task_options(cfg)["_target_"])
    if not issubclass(make, Classification):
        raise QexpError(f"schedule.distill: {make.__name__} cannot learn from a teacher; it is made for classification")
    layers = list(asked.layers or _blocks(cfg, model, data)) if asked.features else []
    found = Distillation(teacher, asked.logits, asked.temperature, asked.features, layers, asked.labels)
    found.check(model, data.example(), cfg.dataset.num_classes)
    return found


def _other(asked: DictConfig, cfg: DictConfig, data: LightningDataModule) -> nn.Module:
    if asked.get("weights") is None:
        raise QexpError(
            f"schedule.distill.teacher={asked.get('name')}: a teacher needs weights; give schedule.distill.teacher.weights=FILE"
        )
    teacher = instantiate(asked.net)
    if not isinstance(evaluated(teacher, data.example()), Tensor):
        training.task(cfg, teacher).take_network(data.example())
    found = load_weights(teacher, asked.weights, dict(asked.get("key_map") or {}), cache_dir(cfg) / "weights")
    log.info("teacher: %s, %s (sha256 %s)", asked.get("name"), found.source, found.sha256[:12])
    if not asked.get("preprocessing"):
        return teacher
    given, own = _normalize(data.preprocessing), _normalize(asked.preprocessing)
    return teacher if given == own else Renormalized(teacher, given, own)


def _normalize(said: Mapping[str, Any]) -> Normalize:
    """Returns what is done to pixel values; nothing is said of the images' size."""
    others = {key: said[key] for key in ("max_value", "channel_order") if key in said}
    return Normalize(tuple(map(float, said["mean"])), tuple(map(float, said["std"])), **others)


def _blocks(cfg: DictConfig, model: nn.Module, data: LightningDataModule) -> list[str]:
    """Returns the last module of each of the model's groups but the one that holds the classifier, whose result the logits are.

    Where that is a convolution, the batch norm after it is meant: before it, small weights make the distance too steep to train on.
    """
    groups = [[group] if isinstance(group, str) else list(group) for group in cfg.model.get("groups") or []]
    last = cfg.model.get("last") or ""
    norms = facts(model, data.example()).bn_of
    blocks = [g[-1] for g in groups if not any(last == name or last.startswith(f"{name}.") for name in g)]
    return [norms.get(name, name) for name in blocks]
