"""Every recipe of `conf/quant` on every task: it calibrates, takes one optimizer step where it learns, and gives finite outputs.

A recipe for one network may refuse another, and names its rule that finds nothing there. The networks are tiny and the images random, and
Lightning is not used: what a whole run adds is in `tests/run`. A new YAML file is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.models.darknet import Darknet
from qexp.models.mobilefacenet import MobileFaceNet
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import Plan, apply, resolve
from qexp.run import pipeline, training
from qexp.run.settings import Settings, read
from qexp.tasks.base import Task
from qexp.tasks.classification import Classification
from qexp.tasks.detection import Detection
from qexp.tasks.verification import Verification
from tests.darknet import write_cfg
from tests.networks import Residual
from tests.shelf import ALL, METHODS, own

FOR_ONE_NETWORK = [name for name in ALL if name not in METHODS]
BATCH = 4


def classification(_: Path) -> tuple[Task, Tensor, object]:
    task = Classification(Residual(), 5)
    return task, torch.randn(BATCH, 3, 8, 8), torch.arange(BATCH)


def detection(folder: Path) -> tuple[Task, Tensor, object]:
    target = {"boxes": torch.tensor([[0.1, 0.1, 0.6, 0.7]]), "labels": torch.ones(1, dtype=torch.int64)}
    target["difficult"] = torch.zeros(1, dtype=torch.bool)
    task = Detection(Darknet(write_cfg(folder), num_classes=2), 2)
    return task, torch.randn(BATCH, 3, 32, 32), [target] * BATCH


def verification(_: Path) -> tuple[Task, Tensor, object]:
    net = MobileFaceNet(size=(32, 32), settings=[(2, 8, 1, 2), (2, 8, 1, 1)])
    return (
        Verification(net, optimizer=torch.optim.SGD, identities=BATCH),
        torch.randn(BATCH, 3, 32, 32),
        torch.arange(BATCH),
    )


TASKS = (classification, detection, verification)


@pytest.fixture(scope="module")
def configuration(compose: Callable[..., DictConfig]) -> Callable[[str], Settings]:
    """Call with the name of a recipe; returns a configuration with it at 4 bits, or at its own widths, composed once for all tasks."""
    return cache(lambda name: read(compose(f"quant={name}", *own(name), "trainer=cpu", "kernels=reference")))


def quantized(settings: Settings, model: nn.Module, images: Tensor) -> Plan:
    """Attaches and fits the recipe's quantizers, in place, in the order of a run; returns the plan."""
    context, passes = PassContext(facts(model, images), [images], {}, progress=False), pipeline.load_passes(settings)
    if settings.bn == "fold":
        context.folded = fold_bn(model, context.facts)
        context.facts = facts(model, images)
    for edit in passes:
        edit.on_float(model, context)
    plan = resolve(model, context.facts, replace(pipeline.recipe(settings), groups=None, first=None, last=None))
    apply(model, plan, context.facts)

    def before_fit(seen) -> None:
        context.calibration = seen
        for edit in passes:
            edit.on_statistics(model, context)

    relus = context.facts.followed_by_relu
    calibrate(model, [images], followed_by_relu=relus, progress=False, before_fit=before_fit)
    for edit in passes:
        edit.on_fitted(model, context)
    return plan


def learn(task: Task, batch: tuple[Tensor, object], settings: Settings) -> Tensor:
    """Takes one optimizer step as a run does, small; returns the loss before it."""
    groups = task.groups or training.parameter_groups(settings.schedule)
    optimizer = torch.optim.SGD(groups(task.model), lr=1e-4)
    parts = list(task.modules())
    task.train()
    for part in parts:
        getattr(part, "before_training", lambda _: None)(1)
    loss = task.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    for part in parts:
        getattr(part, "after_optimizer_step", lambda: None)()
    return loss.detach()


@pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", [*METHODS, *FOR_ONE_NETWORK])
def test_it_calibrates_learns_and_computes_or_says_why_not(configuration, method, make, tmp_path):
    torch.manual_seed(0)
    settings = configuration(method)
    task, images, targets = make(tmp_path)
    task.log = lambda *_, **__: None
    task.eval()
    try:
        plan = quantized(settings, task.model, images)
    except QexpError as refusal:
        assert method in FOR_ONE_NETWORK and str(refusal).startswith("quant.rules."), refusal
        return
    assert any(entry.spec is not None for entry in plan) and list(quantizers(task.model))
    if settings.trains:
        loss = learn(task, (images, targets), settings)
        assert loss.isfinite() and loss > 0
    task.eval()
    with torch.no_grad():
        task.test_step((images, targets), 0)
        first, second = task.model(images), task.model(images)
    assert first.isfinite().all() and len(first) == BATCH
    assert torch.equal(first, second), "evaluation has no memory"
