"""What lies between layers on codes, as the recorded graph shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qexp.integer.code_layer import CodeLayer
from qexp.layers.quantized import QuantConv2d
from qexp.models.modules import Add
from qexp.network import graph

RELUS = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}  # the limits that each sets


@dataclass
class Found:
    """What the graph shows behind a layer or an addition.

    Attributes:
        low, high: Limits that the ReLUs set.
        between: ReLUs and identities.
        readers: Names of the layers on codes that read the result.
        alone: Whether nothing else reads it.
        end: The step whose result is read.
        added: Of an addition, the layer on codes that can add its values in its own pass, and the identities behind it.
        to: Where the other values of that addition are made.
    """

    low: float
    high: float
    between: list[str]
    readers: list[str]
    alone: bool
    end: graph.Step
    added: tuple[str, ...] = ()
    to: str = ""


def find(steps: list[graph.Step], model: nn.Module, layers: Mapping[str, CodeLayer]) -> dict[str, Found]:
    """Returns what follows each layer on codes and each addition, by name, where layers on codes read its result."""
    calls: dict[str, int] = {}
    for step in steps:
        calls[step.module] = calls.get(step.module, 0) + 1
    found: dict[str, Found] = {}
    for step in steps:
        if (
            step.module
            and calls[step.module] == 1
            and _starts(model.get_submodule(step.module), layers.get(step.module))
        ):
            behind = _behind(step, model, layers, calls)
            if behind is not None and behind.readers:
                found[step.module] = behind
    ends = {id(behind.end): name for name, behind in found.items()}
    for step in steps:
        if step.module in found and step.module not in layers:
            found[step.module].added, found[step.module].to = _added(step, steps, model, layers, ends)
    return found


def _added(
    step: graph.Step,
    steps: list[graph.Step],
    model: nn.Module,
    layers: Mapping[str, CodeLayer],
    ends: Mapping[int, str],
) -> tuple[tuple[str, ...], str]:
    """Returns the layer that can compute an addition with its own sums, identities behind it, and what makes the other values before."""
    for mine, other in (step.sources, step.sources[::-1]) if len(step.operands) == 2 else ():
        identities = []
        while _passes_on(mine, model) and len(mine.users) == 1:
            identities.append(mine.module)
            mine = mine.sources[0]
        while _passes_on(other, model):
            other = other.sources[0]
        layer = layers.get(mine.module)
        if layer is None or layer.products is None or len(mine.users) != 1 or id(other) not in ends:
            continue
        called = [s for s in steps if s.module == mine.module]
        if called == [mine] and _starts(layer.layer, layer) and steps.index(other) < steps.index(mine):
            return (mine.module, *identities), ends[id(other)]
    return (), ""


def _passes_on(step: graph.Step, model: nn.Module) -> bool:
    return bool(step.module) and type(model.get_submodule(step.module)) is nn.Identity and len(step.operands) == 1


def _starts(module: nn.Module, layer: CodeLayer | None) -> bool:
    """Returns whether a pass can begin with the results of a module."""
    if layer is not None:
        return type(module) is QuantConv2d and type(module.output_quantizer) is nn.Identity
    return type(module) is Add


def _behind(
    step: graph.Step, model: nn.Module, layers: Mapping[str, CodeLayer], calls: Mapping[str, int]
) -> Found | None:
    low, high, between = -math.inf, math.inf, []
    while len(step.users) == 1 and calls.get(step.users[0].module) == 1 and len(step.users[0].operands) == 1:
        kind = type(model.get_submodule(step.users[0].module))
        if kind not in (*RELUS, nn.Identity):
            break
        step = step.users[0]
        between.append(step.module)
        least, most = RELUS.get(kind, (-math.inf, math.inf))
        low, high = max(low, least), min(high, most)
    if any(user.changed for user in step.users):
        return None
    readers = [user.module for user in step.users if _reads(user, layers, calls)]
    return Found(low, high, between, readers, len(readers) == len(step.users), step)


def _reads(step: graph.Step, layers: Mapping[str, CodeLayer], calls: Mapping[str, int]) -> bool:
    layer = layers.get(step.module)
    return (
        layer is not None
        and layer.grid is not None
        and isinstance(layer.layer, QuantConv2d)
        and calls[step.module] == 1
        and len(step.operands) == 1
    )
