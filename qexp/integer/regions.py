"""Which operations of a program become one pass over their elements.

Between two convolutions lie operations that treat each element by itself: bias, clamp, requantization, addition, table. Those between the
same convolutions form a region. A region reads sums of convolutions and tensors that earlier regions left, and leaves what others read.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from qexp.integer.machine import Machine
from qexp.integer.op import Op
from qexp.integer.program import Add, Clamp, Conv, Linear, Lookup, Requantize

HEADS = (Conv, Linear)  # their sums are computed apart; bias and alignment are of the region
POINTWISE = (Requantize, Clamp, Add, Lookup)


@dataclass
class Region:
    """Operations in the order of the program, and the tensors that others read of it."""

    ops: list[Op]
    leaves: list[str]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that come from outside; those of convolutions are their inputs."""
        own = {op.output for op in self.ops}
        return tuple(dict.fromkeys(name for op in self.ops for name in op.inputs if name not in own))


def regions(machine: Machine, watched: Container[str]) -> list[Region | Op]:
    """Returns a program's operations in an order of execution, those that are one region together.

    Args:
        machine: Program and number types.
        watched: Names of tensors that must exist.
    """
    program = machine.program
    levels = _levels(machine)
    group = _groups(machine, levels)
    readers = {op.output: [r for r in program.ops if op.output in r.inputs] for op in program.ops}
    made: dict[int, Region] = {}
    found: list[tuple[int, int, Region | Op]] = []
    for number, op in enumerate(program.ops):
        mine = group.get(op.output)
        if mine is None:
            found.append((levels[op.output], 0, op))
            continue
        if mine not in made:
            made[mine] = Region([], [])
            found.append((levels[op.output], 1 + number, made[mine]))
        made[mine].ops.append(op)
        outside = not readers[op.output] or any(_outside(r, mine, group) for r in readers[op.output])
        if outside or op.output in watched or op.output == program.output:
            made[mine].leaves.append(op.output)
    return [part for _, _, part in sorted(found, key=lambda entry: entry[:2])]


def _outside(reader: Op, mine: int, group: dict[str, int]) -> bool:
    return isinstance(reader, HEADS) or group.get(reader.output) != mine


def _levels(machine: Machine) -> dict[str, int]:
    """Returns for each tensor how many operations on more than an element lie before it.

    An operation on bytes that widens them waits until its result is read, so that bytes lie in memory meanwhile.
    """
    program = machine.program
    levels = {program.input: 0}
    for op in program.ops:
        levels[op.output] = max(levels[name] for name in op.inputs) + (not isinstance(op, POINTWISE))
    for op in reversed(program.ops):
        readers = [r for r in program.ops if op.output in r.inputs]
        if not isinstance(op, POINTWISE) or not readers or not all(isinstance(r, POINTWISE) for r in readers):
            continue
        if all(machine.stored(name).offset or _is_byte(machine, name) for name in op.inputs):
            levels[op.output] = min(levels[r.output] for r in readers)
    return levels


def _is_byte(machine: Machine, name: str) -> bool:
    return machine.stored(name).dtype.itemsize == 1


def _groups(machine: Machine, levels: dict[str, int]) -> dict[str, int]:
    """Returns a number for each output of an operation in a region: the same where operations of a level share a tensor."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for op in machine.program.ops:
        if isinstance(op, HEADS + POINTWISE):
            parent[op.output] = op.output
    shared: dict[tuple[int, str], str] = {}  # level and tensor -> an operation that makes or reads it
    for op in machine.program.ops:
        if op.output not in parent:
            continue
        level = levels[op.output]
        for name in (op.output, *(() if isinstance(op, HEADS) else op.inputs)):
            other = shared.setdefault((level, name), op.output)
            parent[root(op.output)] = root(other)
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(root(name), len(numbers)) for name in parent}
