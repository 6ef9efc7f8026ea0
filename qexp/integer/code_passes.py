"""One pass from the sums of a layer on codes to the bytes that the next layers read.

Between two layers on codes a simulation writes float32 values, applies ReLU, and makes codes of them: three walks through memory. Where the
recorded graph shows that nothing else lies between, the layer's sums become bytes while they are in the cache; the arithmetic is the
same, operation by operation in float32. Where others read the values too, the same pass leaves values and bytes. Additions likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from qexp_kernels.fused_conv import fused_conv
from qexp_kernels.regrid import MOST, Pass, Step
from torch import Tensor, nn

from qexp.integer.code_graph import Found, find
from qexp.integer.code_layer import CodeLayer
from qexp.models.modules import Add
from qexp.network import graph
from qexp.system.within import hooked


@dataclass
class Running:
    """Whether the whole network runs now; a layer that is called by itself returns its values."""

    now: bool = False

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Follows the calls of a network inside a `with` block."""
        hooks = (
            model.register_forward_pre_hook(lambda *_: self._set(True)),
            model.register_forward_hook(lambda *_: self._set(False), always_call=True),
        )
        with hooked(hooks):
            yield

    def _set(self, now: bool) -> None:
        self.now = now


class OnePass:
    """From sums of products, or from values, to what others read: values, bytes, or both.

    Args:
        found: What follows.
        readers: The layers that read bytes.
        watched: Modules whose hooks may look at a tensor in between; while one has hooks, every module computes by itself.
        running: Whether the whole network runs.
    """

    def __init__(self, found: Found, readers: list[CodeLayer], watched: list[nn.Module], running: Running) -> None:
        self._watched, self._readers, self._running = watched, readers, running
        grids: dict[bytes, Tensor] = {reader.grid.numpy().tobytes(): reader.grid for reader in readers}
        self._grids = list(grids.values())
        self._place = {id(r): list(grids).index(r.grid.numpy().tobytes()) for r in readers}
        self.keeps_values = not found.alone or len(grids) > 1
        self._limits = found.low, found.high
        self._passes: dict[tuple, Pass] = {}
        self._given: Tensor | None = None  # the values that were given away last, and the bytes that belong to them
        self._bytes: list[Tensor] = []
        self._waiting: set[int] = set()
        self._lends: list[CodeLayer] = []  # layers that add the values to theirs

    @property
    def fits(self) -> bool:
        """Returns whether there are few enough results for one pass."""
        return len(self._grids) + self.keeps_values <= MOST

    @property
    def active(self) -> bool:
        """Returns whether the network runs, no hook may look at what lies between, and the next layers are quantized now."""
        return (
            self._running.now
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self._watched)
            and all(reader.layer.enabled for reader in self._readers)
        )

    def of_codes(self, layer: CodeLayer, x: Tensor) -> Tensor:
        """Returns what a layer gives for bytes, and what follows."""
        others: list[Tensor] = []
        if layer.beside is not None:
            other = layer.beside.lent(layer)
            if other is None or list(other.shape) != _shape(layer, x):
                return layer.values(x)  # the addition computes the rest
            others = [other]
        if layer.products is None:
            return self.of_values(layer.values(x))
        return self._give(fused_conv(x, layer.products, self._pass(1 + len(others), layer), others))

    def of_values(self, *xs: Tensor) -> Tensor:
        """Returns what follows values, or the sum of two."""
        return self._give(self._pass(len(xs))(xs))

    def _pass(self, inputs: int, layer: CodeLayer | None = None) -> Pass:
        """Returns the pass for values, or for a layer's sums, with other values beside them where there are two inputs."""
        key = inputs, layer is None
        if key not in self._passes:
            scales = torch.ones(1) if layer is None else layer.scales
            bias = torch.zeros_like(scales) if layer is None or layer.bias is None else layer.bias
            numbers = *self._limits, 0.0, 1.0 if layer is None else layer.scale
            line = torch.stack([scales, bias, *(torch.full_like(scales, v) for v in numbers)]).double()
            results = [torch.float32] * self.keeps_values + [torch.uint8] * len(self._grids)
            values = inputs if self.keeps_values else inputs + len(results)
            steps = [Step("scaled", 0, values, 0, 1 if inputs > 1 else -1)]
            first = inputs + self.keeps_values
            steps += [Step("grid", values, first + k, 1 + k) for k in range(len(self._grids))]
            self._passes[key] = Pass(steps, results, [line, *self._grids])
        return self._passes[key]

    def _give(self, results: list[Tensor]) -> Tensor:
        self._given, self._bytes = results[0], results[1:] if self.keeps_values else results
        self._waiting = {id(reader) for reader in (*self._readers, *self._lends)}
        return self._given

    def clear(self) -> None:
        """Forgets what an earlier run gave away."""
        self._given, self._bytes = None, []

    def lend(self, layer: CodeLayer) -> None:
        """Keeps the values until a layer has added them to its own."""
        self._lends.append(layer)

    def lent(self, layer: CodeLayer) -> Tensor | None:
        """Returns the values that were given away in this run; None if there are none."""
        found = self._given
        self._took(layer)
        return found

    def is_done(self, x: Tensor) -> bool:
        """Returns whether a tensor is what was given away, on which ReLUs have been applied."""
        return x is self._given

    def take(self, layer: CodeLayer, x: Tensor) -> Tensor | None:
        """Returns the bytes that belong to a tensor that was given away for the layer to read; None for another tensor."""
        if x is not self._given:
            return None
        found = self._bytes[self._place[id(layer)]]
        self._took(layer)
        return found

    def _took(self, layer: CodeLayer) -> None:
        self._waiting.discard(id(layer))
        if not self._waiting:
            self.clear()


@contextmanager
def one_pass(steps: list[graph.Step], model: nn.Module, layers: Mapping[str, CodeLayer]) -> Iterator[list[str]]:
    """Computes what lies between layers on codes in one pass inside a `with` block; yields the modules at which a pass begins."""
    changed: list[nn.Module] = []
    started: list[CodeLayer] = []
    running = Running()
    try:
        found, passes = find(steps, model, layers), {}
        for name, behind in found.items():
            involved = [name, *behind.between, *behind.readers, *behind.added]
            inside = dict.fromkeys(part for n in involved for part in _with_parents(n))
            readers = [layers[reader] for reader in behind.readers]
            made = OnePass(behind, readers, [model.get_submodule(n) for n in inside], running)
            if not made.fits:
                continue
            passes[name] = made
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
        for name, made in passes.items():
            other = found[name].to
            if other in passes and passes[other].keeps_values:
                layer = layers[found[name].added[0]]
                layer.behind, layer.beside = made, passes[other]
                passes[other].lend(layer)
                started.append(layer)
        with running.watched(model):
            yield list(passes)
    finally:
        for module in changed:
            vars(module).pop("forward", None)
        for layer in started:
            layer.behind = layer.source = layer.beside = None


def _shape(layer: CodeLayer, x: Tensor) -> list[int]:
    """Returns the shape of a convolution's result."""
    conv = layer.layer
    window = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return [x.shape[0], conv.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window)]


def _with_parents(name: str) -> list[str]:
    """Returns a module's name and those of the modules around it, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _add(module: Add, made: OnePass):
    def forward(a: Tensor, b: Tensor) -> Tensor:
        for x in (a, b):
            if made.is_done(x):  # by the layer whose values are added
                return x
        made.clear()
        alike = a.shape == b.shape and a.dim() == 4 and a.dtype == b.dtype == torch.float32
        if not alike or not made.active:
            return Add.forward(module, a, b)
        return made.of_values(a, b)

    return forward


def _unless_done(module: nn.Module, made: OnePass):
    return lambda input: input if made.is_done(input) else type(module).forward(module, input)
