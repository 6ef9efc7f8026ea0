"""One pass from the sums of a layer on codes to the bytes that the next layers read.

Between two layers on codes a simulation writes float32 values, applies ReLU, and makes codes of them: three walks through memory. Where the
recorded graph shows that nothing else lies between, the layer's sums become bytes while they are in the cache; the arithmetic is the
same, operation by operation in float32. Where others read the values too, the same pass leaves values and bytes. Additions likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from qexp_kernels.fused_conv import fused_conv
from qexp_kernels.regrid import MOST, Pass, Step
from torch import Tensor, nn

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
    """

    low: float
    high: float
    between: list[str]
    readers: list[str]
    alone: bool


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
    return found


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
    return Found(low, high, between, readers, len(readers) == len(step.users))


def _reads(step: graph.Step, layers: Mapping[str, CodeLayer], calls: Mapping[str, int]) -> bool:
    layer = layers.get(step.module)
    return (
        layer is not None
        and layer.grid is not None
        and isinstance(layer.layer, QuantConv2d)
        and calls[step.module] == 1
        and len(step.operands) == 1
    )


class OnePass:
    """From sums of products, or from values, to what others read: values, bytes, or both.

    Args:
        found: What follows.
        readers: The layers that read bytes.
        watched: Modules whose hooks may look at a tensor in between; while one has hooks, every module computes by itself.
    """

    def __init__(self, found: Found, readers: list[CodeLayer], watched: list[nn.Module]) -> None:
        self._watched, self._readers = watched, readers
        grids: dict[bytes, Tensor] = {reader.grid.numpy().tobytes(): reader.grid for reader in readers}
        self._grids = list(grids.values())
        self._place = {id(r): list(grids).index(r.grid.numpy().tobytes()) for r in readers}
        self.keeps_values = not found.alone or len(grids) > 1
        self._limits = found.low, found.high
        self._passes: dict[tuple, Pass] = {}
        self._given: Tensor | None = None  # the values that were given away last, and the bytes that belong to them
        self._bytes: list[Tensor] = []
        self._waiting: set[int] = set()

    @property
    def fits(self) -> bool:
        """Returns whether there are few enough results for one pass."""
        return len(self._grids) + self.keeps_values <= MOST

    @property
    def active(self) -> bool:
        """Returns whether no hook may look at what lies between and the next layers are quantized now."""
        return not any(m._forward_hooks or m._forward_pre_hooks for m in self._watched) and all(
            reader.layer.enabled for reader in self._readers
        )

    def of_codes(self, layer: CodeLayer, x: Tensor) -> Tensor:
        """Returns what a layer gives for bytes, and what follows."""
        if layer.products is None:
            return self.of_values(layer.values(x))
        bias = torch.zeros_like(layer.scales) if layer.bias is None else layer.bias
        return self._give(fused_conv(x, layer.products, self._pass(1, layer.scales, bias, layer.scale)))

    def of_values(self, *xs: Tensor) -> Tensor:
        """Returns what follows values, or the sum of two."""
        return self._give(self._pass(len(xs))(xs))

    def _pass(self, inputs: int, scales: Tensor | None = None, bias: Tensor | None = None, scale: float = 1.0) -> Pass:
        if inputs not in self._passes:
            rows = [torch.ones(1) if scales is None else scales, torch.zeros(1) if bias is None else bias]
            rows += [torch.full_like(rows[0], v) for v in (*self._limits, 0.0)]
            line = torch.stack([r.double() for r in (*rows, torch.full_like(rows[0], scale))])
            results = [torch.float32] * self.keeps_values + [torch.uint8] * len(self._grids)
            values = inputs if self.keeps_values else inputs + len(results)
            steps = [Step("scaled", 0, values, 0, 1 if inputs > 1 else -1)]
            first = inputs + self.keeps_values
            steps += [Step("grid", values, first + k, 1 + k) for k in range(len(self._grids))]
            self._passes[inputs] = Pass(steps, results, [line, *self._grids])
        return self._passes[inputs]

    def _give(self, results: list[Tensor]) -> Tensor:
        self._given, self._bytes = results[0], results[1:] if self.keeps_values else results
        self._waiting = {id(reader) for reader in self._readers}
        return self._given

    def is_done(self, x: Tensor) -> bool:
        """Returns whether a tensor is what was given away, on which ReLUs have been applied."""
        return x is self._given

    def take(self, layer: CodeLayer, x: Tensor) -> Tensor | None:
        """Returns the bytes that belong to a tensor that was given away for the layer to read; None for another tensor."""
        if x is not self._given:
            return None
        found = self._bytes[self._place[id(layer)]]
        self._waiting.discard(id(layer))
        if not self._waiting:
            self._given, self._bytes = None, []
        return found


@contextmanager
def one_pass(steps: list[graph.Step], model: nn.Module, layers: Mapping[str, CodeLayer]) -> Iterator[list[str]]:
    """Computes what lies between layers on codes in one pass inside a `with` block; yields the modules at which a pass begins."""
    changed: list[nn.Module] = []
    started: list[CodeLayer] = []
    try:
        found = find(steps, model, layers)
        for name, behind in found.items():
            involved = [name, *behind.between, *behind.readers]
            inside = dict.fromkeys(part for n in involved for part in _with_parents(n))
            readers = [layers[reader] for reader in behind.readers]
            made = OnePass(behind, readers, [model.get_submodule(n) for n in inside])
            if not made.fits:
                continue
            for reader in readers:
                reader.source = made
                started.append(reader)
            if name in layers:
                layers[name].behind = made
                started.append(layers[name])
            else:
                module = model.get_submodule(name)
                module.forward = _add(module, made)
                changed.append(module)
            for between in behind.between:
                module = model.get_submodule(between)
                module.forward = _unless_done(module, made)
                changed.append(module)
        yield list(found)
    finally:
        for module in changed:
            vars(module).pop("forward", None)
        for layer in started:
            layer.behind = layer.source = None


def _with_parents(name: str) -> list[str]:
    """Returns a module's name and those of the modules around it, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _add(module: Add, made: OnePass):
    def forward(a: Tensor, b: Tensor) -> Tensor:
        alike = a.shape == b.shape and a.dim() == 4 and a.dtype == b.dtype == torch.float32
        if not alike or not made.active:
            return Add.forward(module, a, b)
        return made.of_values(a, b)

    return forward


def _unless_done(module: nn.Module, made: OnePass):
    return lambda input: input if made.is_done(input) else type(module).forward(module, input)
