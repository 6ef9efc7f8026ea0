"""A network as a list of steps with the tensors between them, recorded from one run; replaying the steps computes the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor between two steps: number `index` among the tensors that a step returns, followed by those that it changes."""

    step: Step
    index: int = 0


@dataclass(frozen=True)
class PerImage:
    """A number that depends on the batch size: `fixed + each * images`."""

    fixed: int
    each: int

    def at(self, images: int) -> int:
        """Returns the number for a batch of `images` images."""
        return self.fixed + self.each * images


@dataclass(eq=False)
class Step:
    """A call of a leaf module or of a function; each input of the network and its result are steps too.

    Attributes:
        op: `input`, `module`, `function` or `output`.
        name: Unique and stable: `layer1.0.conv1`, `relu@1` (a module's second call), `layer1.0.add_1` (a second sum in one call).
        target: Name of the module, or of the function (a method's is that of the method).
        call: The module or function itself.
        args, kwargs: Arguments of the call; `Ref` for the tensors of other steps, `PerImage` for numbers that depend on the batch size.
        operands: The tensors among the arguments, in the order of the signature.
        changed: Tensors that this call wrote into, besides its results; `Ref.index` counts them after the results.
        results: How many tensors it returned.
        users: The steps that read a result of this one, each once.
        depends: Whether the result depends on the input of the network; otherwise it follows from constants and weights.
    """

    op: str
    name: str
    target: str = ""
    call: Callable[..., Any] | None = None
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    operands: tuple[Ref, ...] = ()
    changed: tuple[Any, ...] = ()
    results: int = 1
    users: list[Step] = field(default_factory=list)
    depends: bool = False

    @property
    def module(self) -> str:
        """Name of the module that is called, `""` for anything else."""
        return self.target if self.op == "module" else ""

    @property
    def function(self) -> str:
        """Name of the function that is called, `""` for anything else."""
        return self.target if self.op == "function" else ""

    @property
    def sources(self) -> list[Step]:
        """The steps whose results are the operands."""
        return [ref.step for ref in self.operands]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Returns an argument, passed by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def __repr__(self) -> str:
        return f"<{self.op} {self.name}>"


@dataclass(eq=False)
class Graph:
    """The steps of a network, in order: inputs first, the result last."""

    steps: list[Step]

    @property
    def inputs(self) -> list[Step]:
        """The network's inputs."""
        return [step for step in self.steps if step.op == "input"]

    @property
    def output(self) -> Step:
        """The step that returns the result: `args[0]`."""
        return self.steps[-1]

    def replay(self, *inputs: Tensor, keep: Callable[[Step, list[Tensor]], None] | None = None) -> Any:
        """Returns the network's result for other images, computed from the steps alone.

        Args:
            inputs: The images.
            keep: Called with each step and the tensors that it makes.
        """
        images = len(inputs[0])
        made: dict[tuple[int, int], Any] = {}
        last = {id(ref.step): number for number, step in enumerate(self.steps) for ref in _refs(step)}
        dead: dict[int, list[Step]] = {}
        for step in self.steps:
            dead.setdefault(last.get(id(step), -1), []).append(step)

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return made[id(leaf.step), leaf.index]
            return leaf.at(images) if isinstance(leaf, PerImage) else leaf

        given = iter(inputs)
        for number, step in enumerate(self.steps):
            if step.op == "input":
                made[id(step), 0] = next(given)
                continue
            args, kwargs = mapped(value, step.args), mapped(value, step.kwargs)
            if step.op == "output":
                return args[0]
            changed = [value(leaf) for leaf in step.changed]
            results = [*tensors(step.call(*args, **kwargs)), *changed]
            for k, tensor in enumerate(results):
                made[id(step), k] = tensor
            if keep:
                keep(step, results)
            for done in dead.get(number, ()):
                for k in range(done.results + len(done.changed)):
                    made.pop((id(done), k), None)
        raise AssertionError("a graph ends with its output")


def _refs(step: Step) -> list[Ref]:
    return [*step.operands, *(leaf for leaf in step.changed if isinstance(leaf, Ref))]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns nested tuples, lists, dictionaries, slices and dataclasses with a function applied to each leaf."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, v) for v in value))
    if isinstance(value, tuple):
        return tuple(mapped(function, v) for v in value)
    if isinstance(value, list):
        return [mapped(function, v) for v in value]
    if isinstance(value, Mapping):
        return {k: mapped(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(function, v) for v in (value.start, value.stop, value.step)))
    if _holds(value):
        return {f.name: mapped(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """Yields the leaves of nested tuples, lists, dictionaries, slices and dataclasses, in order."""
    if isinstance(value, tuple | list):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from leaves(v)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    elif _holds(value):
        for f in dataclasses.fields(value):
            yield from leaves(getattr(value, f.name))
    else:
        yield value


def _holds(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Ref | PerImage | Tensor)


def tensors(value: Any) -> list[Tensor]:
    """Returns the tensors that a value holds, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def same(one: Any, other: Any) -> bool:
    """Returns whether two results are equal to the bit: the same tensors, shapes and types (NaN equals NaN)."""
    a, b = tensors(one), tensors(other)
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def near(one: Any, other: Any, most: float = 1e-4) -> bool:
    """Returns whether two results are equal but for the rounding of other operations: relative to their norm, at most `most` apart."""
    a, b = tensors(one), tensors(other)
    return len(a) == len(b) and all(_near(x, y, most) for x, y in zip(a, b))


def _near(a: Tensor, b: Tensor, most: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return _equal(a, b)
    return float((a - b).norm()) <= most * float(a.norm())
