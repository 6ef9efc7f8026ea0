"""From the quantized network to its integer program: the graph is read in order, each tensor gets its integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.integer.grids import Grid, activation_grid, cannot
from qexp.integer.program import IntegerProgram, Requantize
from qexp.integer.values import Value, Writer
from qexp.layers.quantized import Quantized, float_class
from qexp.models.modules import StridedPad
from qexp.network.graph import Ref, Step
from qexp.network.recorder import record
from qexp.quantizers.base import Quantizer

FLOAT_INPUT = "add deploy=integer, which puts quantizers where integers need them, or name one with a rule"


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
    seen = record(model, example, leaves=(StridedPad,))
    if seen.graph is None:
        raise cannot(
            type(model).__name__, f"its graph is not known ({seen.error})", "write it without data-dependent steps"
        )
    walk = Walk(model, example)
    for step in seen.graph.steps:
        if step.depends:
            walk.visit(step)
    walk.lowered.program.about = dict(about or {})
    return walk.lowered


class Walk:
    """Visits the steps of a recorded network; what is made of each type of layer is in `layers`."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model, self.writer = model, Writer()
        self.lowered = Lowered(self.writer.program)
        self.values: dict[Step, Value] = {}
        self.calls: set[str] = set()
        self.image = Value("", np.ones(1), np.zeros(1, np.int64), 0, 0, tuple(example.shape[1:]))

    def visit(self, step: Step) -> None:
        """Writes the operations of one step."""
        from qexp.integer.layers import FUNCTIONS, LAYERS  # they know this class

        if step.op == "input":
            self.values[step] = self.image
        elif step.op == "output":
            self._finish(step.args[0])
        elif step.op == "module":
            layer = self.model.get_submodule(step.module)
            rule = _of(LAYERS, layer)
            if rule is None:
                raise cannot(step.module, f"{float_class(layer).__name__} has no integer form", _known(LAYERS))
            if isinstance(layer, Quantized) and step.module in self.calls:
                raise cannot(step.module, "it runs more than once", "give each call a module of its own")
            self.calls.add(step.module)
            given = (*step.args, *step.kwargs.values())
            if len(given) != len(step.operands):
                odd = next(a for a in given if not isinstance(a, Ref))
                raise cannot(step.module, f"its argument {odd!r} is no tensor", "call layers with tensors alone")
            args = [self.operand(ref, step.module) for ref in step.operands]
            self.values[step] = rule(self, step, step.module, layer, *args)
        else:
            if step.function not in FUNCTIONS:
                hint = "write the sum as a module (qexp.models.modules.Add)" if step.function in _SUMS else None
                raise cannot(step.name, f"the function {step.function} has no integer form", hint or _known(LAYERS))
            self.values[step] = FUNCTIONS[step.function](self, step, step.name)

    def operand(self, ref: Ref, where: str) -> Value:
        """Returns the value of a tensor that a step reads."""
        if ref.step not in self.values or ref.index:
            raise cannot(where, f"it reads a tensor of {ref.step.name} that has no integer form", "make it a layer")
        return self.values[ref.step]

    def first(self, step: Step) -> Value:
        """Returns the value of the first tensor that a function reads."""
        return self.operand(step.operands[0], step.name)

    def sole_user(self, step: Step) -> bool:
        """Whether only this step reads the tensor of its argument, under whatever name."""
        tensor = self.values[step.operands[0].step].tensor
        same = {n for n, value in self.values.items() if value.tensor == tensor}
        return {user for n in same for user in n.users} - same == {step}

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
        if not isinstance(result, Ref):
            raise cannot("the network", "its result is no single tensor", "lower a classifier")
        value = self.integers(self.operand(result, "the network's result"), "the network's result")
        if not value.even:
            (value,) = self.settle([value], "", ["output"])
        self.writer.program.output = value.tensor


def _of(rules: dict[type, Callable], layer: nn.Module) -> Callable | None:
    kind = float_class(layer)
    return rules.get(type(layer)) or next((rules[c] for c in kind.__mro__ if c in rules), None)


def _known(rules: dict[type, Callable]) -> str:
    return f"known are {', '.join(sorted({k.__name__ for k in rules}))}"


_SUMS = {"__add__", "__iadd__", "__radd__", "add", "add_"}
