"""The teacher of a distilled training: the run's own float network, or another model with weights of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qexp.data.contract import DataSet
from qexp.data.tensors import Normalize
from qexp.errors import QexpError
from qexp.models.weights import load_weights
from qexp.network.facts import Facts
from qexp.run import training
from qexp.run.experiment import Experiment
from qexp.run.settings import Network, Settings
from qexp.system.objects import find, make
from qexp.tasks.base import evaluated
from qexp.tasks.classification import Classification
from qexp.tasks.distillation import Distillation

log = logging.getLogger(__name__)


class Renormalized(nn.Module):
    """Wraps a network: converts images normalised by `given` to its own normalisation `own`; sizes stay."""

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


def distillation(run: Experiment) -> Distillation | None:
    """Returns the schedule's `distill` as an object, checked against the network; None where it is off."""
    settings, data, model = run.settings, run.data, run.model
    asked = settings.schedule.distill
    if not asked.is_on:
        return None
    if asked.teacher is not None:
        teacher = _other(asked.teacher, settings, data)
    elif not settings.schedule.from_scratch:
        teacher = copy.deepcopy(model)
    else:
        raise QexpError(
            f"schedule.distill: schedule={settings.schedule.name} starts from random weights, so there is no float network to learn "
            "from; name one: "
            "model@schedule.distill.teacher=MODEL schedule.distill.teacher.weights=FILE"
        )
    task = find(settings.data.task, "dataset.task")
    if not issubclass(task, Classification):
        raise QexpError(f"schedule.distill: {task.__name__} cannot learn from a teacher; it is made for classification")
    layers = list(asked.layers or _blocks(settings, run.facts)) if asked.features else []
    found = Distillation(teacher, asked.logits, asked.temperature, asked.features, layers, asked.labels)
    found.check(model, data.example(), settings.data.num_classes)
    return found


def _other(asked: Network, settings: Settings, data: DataSet) -> nn.Module:
    if asked.weights is None:
        raise QexpError(
            f"schedule.distill.teacher={asked.name}: a teacher needs weights; give schedule.distill.teacher.weights=FILE"
        )
    teacher = make(asked.net, where="schedule.distill.teacher.net")
    if not isinstance(evaluated(teacher, data.example()), Tensor):
        training.task(settings, teacher).take_network(data.example())
    found = load_weights(teacher, asked.weights, asked.key_map, settings.shared / "weights")
    log.info("teacher: %s, %s (sha256 %s)", asked.name, found.source, found.sha256[:12])
    if not asked.preprocessing:
        return teacher
    given, own = _normalize(data.preprocessing), _normalize(asked.preprocessing)
    return teacher if given == own else Renormalized(teacher, given, own)


def _normalize(said: Mapping[str, Any]) -> Normalize:
    """Returns the normalisation of pixel values; the size of the images is ignored."""
    others = {key: said[key] for key in ("max_value", "channel_order") if key in said}
    return Normalize(tuple(map(float, said["mean"])), tuple(map(float, said["std"])), **others)


def _blocks(settings: Settings, found: Facts) -> list[str]:
    """Returns the last module of each of the model's groups, without the group of the classifier, whose output is the logits.

    Where that module is a convolution, the batch norm after it is returned: before it, small weights make the distance too steep to
    train on.
    """
    groups = [[group] if isinstance(group, str) else list(group) for group in settings.network.groups or []]
    last = settings.network.last or ""
    blocks = [g[-1] for g in groups if not any(last == name or last.startswith(f"{name}.") for name in g)]
    return [found.bn_of.get(name, name) for name in blocks]
