"""From the quantized network to its integer program: the graph is read in order, each tensor gets its integers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qexp.graph import Tracer
from qexp.integer.grids import Grid, activation_grid, cannot
from qexp.integer.program import IntegerProgram, Requantize
from qexp.integer.values import Value, Writer
from qexp.layers.quantized import Quantized, float_class
from qexp.models.modules import StridedPad
from qexp.quantizers.base import Quantizer

FLOAT_INPUT = (
    "give the first layer's input bits: where a list or a rule says 32 for it, say 8 (layer_abit=[8,...]); "
    "where the recipe has no quantizer there, add deploy=integer or name one with a rule"
)


@dataclass(frozen=True)
class Site:
    """What happens at a tensor of a layer, for those who simulate it: a float `x` becomes codes of `tensor`.

    Attributes:
        tensor: The program's tensor that holds the codes.
        arriving: The value before: `x = (code - zero) * unit`; None for images, which the quantizer itself encodes.
        op: The requantization; None where the tensor is on its grid already.
        leaving: The value after.
        quantized: Whether the network has a quantizer there; otherwise the tensor is float in the ordinary simulation.
    """

    tensor: str
    arriving: Value | None
    op: Requantize | None
    leaving: Value
    quantized: bool


@dataclass
class Lowered:
    """A program, and how the network it was read from computes the same numbers.

    Attributes:
        program: The operations.
        sites: By (layer, site), what happens to activations; the layer `""` is the network's result.
        constants: By layer and site, the real values (float64) of weights, biases and statistics that the integers stand for.
        steps: By layer, the real value of an integer weight of 1, `[O]`.
    """

    program: IntegerProgram
    sites: dict[tuple[str, str], Site] = field(default_factory=dict)
    constants: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    steps: dict[str, np.ndarray] = field(default_factory=dict)


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, StridedPad) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def lower(model: nn.Module, example: Tensor, about: dict[str, Any] | None = None) -> Lowered:
    """Returns the integer program of a quantized, calibrated classifier; the model is left as it was.

    Args:
        model: Network whose activations and weights carry quantizers.
        example: Images `[N, C, H, W]`, for the shapes.
        about: What to write into the program of its origin.

    Raises:
        QexpError: By layer and reason, what has no integer form.
    """
    try:
        graph = _Tracer().trace(copy.deepcopy(model).eval())
    except Exception as error:  # whatever a foreign model's forward raises while being traced
        raise cannot(
            type(model).__name__,
            f"it cannot be traced ({type(error).__name__}: {error})",
            "write it without data-dependent steps",
        ) from error
    walk = Walk(model, example)
    for node in graph.nodes:
        walk.visit(node)
    walk.lowered.program.about = dict(about or {})
    return walk.lowered


class Walk:
    """Visits the nodes of a traced network; what is made of each type of layer is in `layers`."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model, self.writer = model, Writer()
        self.lowered = Lowered(self.writer.program)
        self.values: dict[fx.Node, Value] = {}
        self.calls: set[str] = set()
        self.image = Value("", np.ones(1), np.zeros(1, np.int64), 0, 0, tuple(example.shape[1:]))

    def visit(self, node: fx.Node) -> None:
        """Writes the operations of one node."""
        from qexp.integer.layers import FUNCTIONS, LAYERS, METHODS  # they know this class

        if node.op == "placeholder":
            self.values[node] = self.image
        elif node.op == "output":
            self._finish(node.args[0])
        elif node.op == "call_module":
            layer = self.model.get_submodule(node.target)
            rule = _of(LAYERS, layer)
            if rule is None:
                raise cannot(node.target, f"{float_class(layer).__name__} has no integer form", _known(LAYERS))
            if isinstance(layer, Quantized) and node.target in self.calls:
                raise cannot(node.target, "it runs more than once", "give each call a module of its own")
            self.calls.add(node.target)
            args = [self.operand(a, node.target) for a in node.args]
            self.values[node] = rule(self, node, node.target, layer, *args)
        elif node.op in ("call_function", "call_method"):
            rules: dict[Any, Callable] = FUNCTIONS if node.op == "call_function" else METHODS
            where = node.name
            if node.target not in rules:
                hint = "write the sum as a module (qexp.models.modules.Add)" if node.target in _SUMS else _known(LAYERS)
                raise cannot(
                    where, f"the function {getattr(node.target, '__name__', node.target)} has no integer form", hint
                )
            self.values[node] = rules[node.target](self, node, where)
        else:
            raise cannot(node.name, f"a tensor of the network's own ({node.target}) takes part", "make it a layer")

    def operand(self, arg: Any, where: str) -> Value:
        """Returns the value of a node's argument."""
        if not isinstance(arg, fx.Node) or arg not in self.values:
            raise cannot(where, f"its argument {arg!r} is no tensor", "call layers with tensors alone")
        return self.values[arg]

    def sole_user(self, node: fx.Node) -> bool:
        """Whether only this node reads the tensor of its argument, under whatever name."""
        tensor = self.values[node.args[0]].tensor
        same = {n for n, value in self.values.items() if value.tensor == tensor}
        return {user for n in same for user in n.users} - same == {node}

    def site(self, name: str, layer: nn.Module, site: str, value: Value) -> Value:
        """Returns the value after the quantizer on a site of a layer, if there is one."""
        quantizer = layer.site(site) if isinstance(layer, Quantized) and site in layer.sites else None
        if not isinstance(quantizer, Quantizer):
            return value
        where = f"{name}.{site}"
        grid = activation_grid(quantizer, where)
        if not value.tensor:
            return self._encode(where, (name, site), grid, value)
        new, op = self.writer.requantize(value, grid, name, where)
        self.lowered.sites[name, site] = Site(new.tensor, value, op, new, quantized=True)
        return new

    def _encode(self, where: str, key: tuple[str, str], grid: Grid, value: Value) -> Value:
        program = self.writer.program
        if program.input:
            held = program.tensors[program.input]
            if not (np.array_equal(held.unit, grid.scale) and np.array_equal(held.zero_point, grid.zero)):
                raise cannot(
                    where,
                    f"the images have another grid at {program.input}",
                    "let both share one quantizer (share: NAME)",
                )
            new = Value(program.input, grid.scale, grid.zero, grid.low, grid.high, value.shape)
        else:
            new = self.writer.declare(Value(where, grid.scale, grid.zero, grid.low, grid.high, value.shape))
            program.input, program.rounding = where, grid.rounding
        self.lowered.sites[key] = Site(new.tensor, None, None, new, quantized=True)
        return new

    def integers(self, value: Value, where: str) -> Value:
        """Returns the value, after checking that it has codes: images have none before their quantizer."""
        if not value.tensor:
            raise cannot(where, "the images arrive as floats", FLOAT_INPUT)
        return value

    def settle(self, values: list[Value], name: str, sites: list[str]) -> list[Value]:
        """Returns values on power-of-two steps that can be added or compared; those that are float in the simulation are moved there."""
        new, ops = self.writer.settle(values, name, f"{name}.sum" if name else "scores")
        for before, after, op, site in zip(values, new, ops, sites):
            if op is not None:
                self.lowered.sites[name, f"{site} (wide)"] = Site(after.tensor, before, op, after, quantized=False)
        return new

    def _finish(self, result: Any) -> None:
        if not isinstance(result, fx.Node):
            raise cannot("the network", "its result is no single tensor", "lower a classifier")
        value = self.integers(self.values[result], "the network's result")
        if not value.even:
            (value,) = self.settle([value], "", ["output"])
        self.writer.program.output = value.tensor


def _of(rules: dict[type, Callable], layer: nn.Module) -> Callable | None:
    kind = float_class(layer)
    return rules.get(type(layer)) or next((rules[c] for c in kind.__mro__ if c in rules), None)


def _known(rules: dict[type, Callable]) -> str:
    return f"known are {', '.join(sorted({k.__name__ for k in rules}))}"


_SUMS = {operator.add, operator.iadd, torch.add}
