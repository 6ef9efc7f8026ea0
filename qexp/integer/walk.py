"""Visits the steps of a recorded network and gives each tensor its integers, by rules given as arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.integer.grids import CannotLowerError, Grid, activation_grid, cannot
from qexp.integer.lowered import Lowered, Place, Site
from qexp.integer.moves import Concat, Flatten, Permute, Reshape, Slice
from qexp.integer.products import Affine
from qexp.integer.program import Clamp, Conv, Linear
from qexp.integer.signs import compared, signs_of
from qexp.integer.values import Value, Writer
from qexp.layers.forms import form
from qexp.layers.quantized import Quantized, float_class
from qexp.network.graph import PerImage, Ref, Step, mapped, tensors
from qexp.quantizers.base import Quantizer

FLOAT_INPUT = (
    "give the first layer's input bits: where a list or a rule has 32 for it, use 8 (layer_abit=[8,...]); "
    "where the recipe has no quantizer there, add deploy=integer or name one with a rule"
)


class Walk:
    """Visits the steps of a recorded network.

    Args:
        model: The network.
        example: Images `[N, C, H, W]`, for the shapes.
        layers: Conversion of each type of layer: a function `(walk, step, name, layer, *values) -> value`, or `-> values` where the
            layer returns several tensors. It serves calls of functions too, as the layer that computes the same (`qexp.layers.forms`).
        functions: Conversion of functions and methods that no layer computes, by name: `(walk, step, name) -> value`.
        as_runtimes: Requantize results of layers in float32, as 8-bit runtimes do.
        anywhere: Types of layers that treat the entries of all dimensions, or all but the last ones, alike.
        moving: Types of layers whose conversion finds the dimensions itself, wherever the batch lies.
        one_scale: Layers whose results get one scale for all channels, in the simulation as well.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        layers: dict[type[nn.Module], Callable[..., Value]],
        functions: dict[str, Callable[..., Value]],
        as_runtimes: bool = False,
        anywhere: Collection[type[nn.Module]] = (),
        moving: Collection[type[nn.Module]] = (),
        one_scale: Collection[str] = (),
    ) -> None:
        self.anywhere, self.moving, self.one_scale = anywhere, moving, one_scale
        self.model, self.example, self.writer = model, example, Writer(as_runtimes)
        self.layers, self.functions = layers, functions
        self.lowered = Lowered(self.writer.program)
        self.values: dict[Step, Value | tuple[Value, ...]] = {}
        self.constants: dict[Step, list[Any]] = {}  # results of steps that do not depend on the images
        self.calls: set[str] = set()
        self.image = Value("", np.ones(1), np.zeros(1, np.int64), 0, 0, tuple(example.shape[1:]))

    def visit(self, step: Step) -> None:
        """Writes the operations of one step."""
        if step.op == "input":
            self.values[step] = self.image
        elif step.op == "output":
            self._finish(step.args[0])
        elif step.op == "module":
            layer = self.model.get_submodule(step.module)
            rule = _of(self.layers, layer)
            if rule is None:
                raise cannot(step.module, f"{float_class(layer).__name__} has no integer form", _known(self.layers))
            if isinstance(layer, Quantized) and step.module in self.calls:
                raise cannot(step.module, "it runs more than once", "give each call a module of its own")
            self.calls.add(step.module)
            given = (*step.args, *step.kwargs.values())
            if len(given) != len(step.operands):
                odd = next(a for a in given if not isinstance(a, Ref))
                raise cannot(step.module, f"its argument {odd!r} is no tensor", "call layers with tensors alone")
            args = [self.operand(ref, step.module) for ref in step.operands]
            self.values[step] = self._by(rule, step, step.module, layer, args)
        elif step.function in self.functions:
            self.values[step] = self.functions[step.function](self, step, step.name)
        else:
            self.values[step] = self._function(step)

    def assume(self, step: Step, shapes: list[tuple[int, ...]]) -> None:
        """Gives the tensors of a step that was refused 8-bit codes, so that the visit goes on and finds what else has no integer form."""
        made = [
            self.writer.declare(
                Value(
                    self.writer.fresh(f"{step.name} (refused)"),
                    np.full(1, 1 / 16),
                    np.zeros(1, np.int64),
                    -128,
                    127,
                    shape,
                )
            )
            for shape in shapes
        ]
        self.values[step] = made[0] if len(made) == 1 else tuple(made)

    def _function(self, step: Step) -> Value | tuple[Value, ...]:
        """Returns the value of a function call, by the rule of the layer that computes the same."""
        args, kwargs = mapped(self._held, step.args), mapped(self._held, step.kwargs)
        call = form(step.function, args, kwargs, (Ref,)) or form(step.function, step.args, step.kwargs, (Ref,))
        rule = _of(self.layers, call.module()) if call is not None else None
        if rule is None:
            known = call.kind.__name__ if call is not None else f"the function {step.function}"
            raise cannot(step.name, f"{known} has no integer form with these arguments", _known(self.layers))
        if step.changed:
            raise cannot(step.name, "it writes into a tensor that has another name too", "let it return a new tensor")
        operands = [self.operand(ref, step.name) for ref in call.operands]
        return self._by(rule, step, step.name, call.module(), operands)

    def _by(
        self, rule: Callable, step: Step, name: str, layer: nn.Module, args: list[Value]
    ) -> Value | tuple[Value, ...]:
        """Returns what a rule makes of values; where the batch lies in another place, or holds parts of images, it does afterwards."""
        kind = float_class(layer)
        places = {Place(x.batch, x.lead) for x in args if x.real is None} or {Place()}
        if places == {Place()}:
            return self._settled(name, rule(self, step, name, layer, *args))
        if len(places) > 1 or kind not in (*self.moving, *self.anywhere):
            raise cannot(
                name,
                "its input has no images in dimension 0, or parts of images",
                "move dimension 0 back before it: x.permute(...), x.reshape(n, ...)",
            )
        place, sites, computed = places.pop(), self.lowered.sites, self.lowered.computed
        before = {*sites, *computed}
        made = self._settled(name, rule(self, step, name, layer, *args))
        for noted in (sites, computed):
            noted |= {key: replace(noted[key], place=place) for key in noted.keys() - before}
        return made if kind in self.moving else replace(made, batch=place.batch, lead=place.lead)

    def _settled(self, name: str, made: Value | tuple[Value, ...]) -> Value | tuple[Value, ...]:
        """Returns the result of a layer with one scale, where it is one of those that need that."""
        if name not in self.one_scale or not isinstance(made, Value) or made.uniform:
            return made
        (whole,) = self.settle([made], name, ["output (even)"])
        return replace(whole, axis=0, dims=1, most=None)

    def _held(self, leaf: Any) -> Any:
        """Returns an argument with constants in place of references to results that do not depend on the images."""
        if isinstance(leaf, Ref) and leaf.step in self.constants:
            return self.constants[leaf.step][leaf.index]
        return leaf

    def constant(self, step: Step) -> None:
        """Computes a step that does not depend on the images; its result is an argument of later calls.

        It computes in float64, as the simulation does: a bias of relative positions that differed in the last bit would move codes.
        """
        if step.op in ("module", "function"):
            args, kwargs = mapped(self._held, step.args), mapped(self._held, step.kwargs)
            args, kwargs = mapped(self._for_one_image, args), mapped(self._for_one_image, kwargs)
            args, kwargs = mapped(_wide, args), mapped(_wide, kwargs)
            call = copy.deepcopy(self.model.get_submodule(step.module)).double() if step.module else step.call
            made = call(*args, **kwargs)
            self.constants[step] = [*tensors(made), *mapped(self._held, list(step.changed))]

    def _for_one_image(self, leaf: Any) -> Any:
        """Returns a number for one image; for a tensor that depends on images, whose values are not read here, zeros of its size."""
        if isinstance(leaf, Ref) and isinstance(value := self.values.get(leaf.step), Value):
            return torch.zeros(value.shape if value.lead else (1, *value.shape))
        return leaf.at(1) if isinstance(leaf, PerImage) else leaf

    def operand(self, ref: Ref, where: str) -> Value:
        """Returns the value of a tensor that a step reads."""
        if ref.step in self.constants:
            real = self.constants[ref.step][ref.index].detach().cpu().double().numpy()
            return Value("", np.ones(1), np.zeros(1, np.int64), 0, 0, real.shape[1:], real=real)
        held = self.values.get(ref.step)
        held = held if isinstance(held, tuple) else (held,)
        if ref.index >= len(held) or held[ref.index] is None:
            raise cannot(where, f"it reads a tensor of {ref.step.name} that has no integer form", "make it a layer")
        return held[ref.index]

    def first(self, step: Step) -> Value:
        """Returns the value of the first tensor that a function reads."""
        return self.operand(step.operands[0], step.name)

    def sole_user(self, step: Step) -> bool:
        """Whether only this step reads the tensor of its argument, under any name."""
        tensor = self.first(step).tensor
        same = {n for n, value in self.values.items() if isinstance(value, Value) and value.tensor == tensor}
        return {user for n in same for user in n.users} - same == {step}

    def site(self, name: str, layer: nn.Module, site: str, value: Value) -> Value:
        """Returns the value after the quantizer on a site of a layer, if there is one."""
        quantizer = layer.site(site) if isinstance(layer, Quantized) and site in layer.sites else None
        if not isinstance(quantizer, Quantizer):
            return value
        where = f"{name}.{site}"
        if value.real is not None:
            return self.integers(value, where)
        signs = signs_of(quantizer, where)
        if signs is not None:
            made, leaving, op = compared(self.writer, signs, self.integers(value, where), name, where)
            self.lowered.sites[name, site] = Site(leaving.tensor, value, op, leaving, quantized=True)
            return made
        grid = activation_grid(quantizer, where)
        if not value.tensor:
            return self._encode(where, (name, site), grid, value)
        shape = value.shape
        if value.dims > 1:
            one = max(grid.scale.size, grid.zero.size) == 1
            value = self.writer.joined(value, name) if one else self.integers(value, where)
        new, op = self.writer.requantize(value, grid, name, where)
        self.lowered.sites[name, site] = Site(new.tensor, value, op, new, quantized=True)
        return self.writer.reshaped(new, shape, name) if new.shape != shape else new

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
        """Returns the value after checking that it has codes; images have no codes before their quantizer."""
        if value.real is not None:
            raise cannot(
                where, "it reads a constant tensor", "give the constant to a sum, a product or a concatenation"
            )
        if not value.tensor:
            raise cannot(where, "the images are not quantized", FLOAT_INPUT)
        if value.dims > 1 and value.uniform:
            return replace(value, axis=0, dims=1, most=None if value.most is None else value.most.max(keepdims=True))
        if value.dims > 1:
            reason = "its channels, which have different scales, spread over several dimensions"
            remedy = "give the layer before the reshaping an output quantizer (quant.output)"
            raise CannotLowerError(where, reason, remedy, self.source(value))
        return value

    def rounds(self, name: str) -> bool:
        """Whether the simulation can round the operands of a step: it is a module, or a call with a stand-in."""
        try:
            self.model.get_submodule(name)
        except AttributeError:
            return False
        return True

    def source(self, value: Value) -> str | None:
        """Returns the layer that made a value, which has been moved since, if the simulation can round that layer's result."""
        op = self.writer.maker(value)
        while isinstance(op, Slice | Reshape | Flatten | Permute):
            op = self.writer.maker(self.writer.value(op.inputs[0]))
        known = (
            isinstance(op, Conv | Linear | Clamp | Concat | Affine) and (op.layer, "output") not in self.lowered.sites
        )
        return op.layer if known and self.rounds(op.layer) else None

    def settle(self, values: list[Value], name: str, sites: list[str]) -> list[Value]:
        """Returns values on power-of-two steps that can be added or compared; those that are float in the simulation are moved there."""
        new, ops = self.writer.settle(values, name, f"{name}.sum" if name else "scores")
        if any(op is not None for op in ops) and not self.rounds(name):
            remedy = "give the layers before it output quantizers of one scale (quant.output)"
            mends = next(filter(None, (self.source(v) for v, op in zip(values, ops) if op is not None)), None)
            raise CannotLowerError(name, "it joins scales that differ", remedy, mends)
        for before, after, op, site in zip(values, new, ops, sites):
            if op is not None:
                self.lowered.sites[name, f"{site} (wide)"] = Site(after.tensor, before, op, after, quantized=False)
        return new

    def _finish(self, result: Any) -> None:
        if not isinstance(result, Ref):
            raise cannot("the network", "its result is no single tensor", "lower a classifier")
        value = self.integers(self.operand(result, "the network's result"), "the network's result")
        if value.batch or value.lead:
            raise cannot("the network", "its result has no images in dimension 0", "move them there: x.permute(...)")
        if not value.even:
            (value,) = self.settle([value], "", ["output"])
        self.writer.program.output = value.tensor


def _wide(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _of(rules: dict[type, Callable], layer: nn.Module) -> Callable | None:
    kind = float_class(layer)
    return rules.get(type(layer)) or next((rules[c] for c in kind.__mro__ if c in rules), None)


def _known(rules: dict[type, Callable]) -> str:
    return f"known are {', '.join(sorted({k.__name__ for k in rules}))}"
