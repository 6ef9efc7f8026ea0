"""Moves requantizations to bytes before operations that only choose elements, so that these choose bytes."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import numpy as np

from qexp.integer.arithmetic import width
from qexp.integer.moves import Concat, StridedPad
from qexp.integer.op import Op
from qexp.integer.program import IntegerProgram, MaxPool, Requantize
from qexp.integer.reference import requantize


def narrow_first(program: IntegerProgram, watched: Container[str]) -> IntegerProgram:
    """Returns a program of the same results in which pools, paddings and concatenations work on bytes where they can.

    A requantization keeps the order of numbers, so the greatest of its results is its result for the greatest.

    Args:
        program: The program.
        watched: Names of tensors that must exist.
    """
    made = IntegerProgram(dict(program.tensors), [], program.input, program.output, program.rounding, program.about)
    moved: set[str] = set()  # outputs of requantizations that stand earlier now
    for op in program.ops:
        if op.output in moved:
            continue
        readers = [r for r in program.ops if op.output in r.inputs]
        if op.output in watched or not readers or not all(_moves(program, op, r) for r in readers):
            made.ops.append(op)
            continue
        for reader in readers:
            made.ops += _exchanged(made, op, reader)
            moved.add(reader.output)
    return made


def _moves(program: IntegerProgram, op: Op, reader: Op) -> bool:
    """Returns whether a requantization behind an operation can stand before it, and makes bytes of wider codes."""
    if not isinstance(op, MaxPool | StridedPad | Concat) or not isinstance(reader, Requantize):
        return False
    after, before = program.tensors[reader.output], [program.tensors[name] for name in op.inputs]
    narrows = width(after.low, after.high) <= 8 < max(width(spec.low, spec.high) for spec in before)
    constants = (reader.multiplier, reader.addend, reader.shift, reader.zero)
    is_shared = all(v.size == 1 for v in constants)
    return narrows and bool((reader.multiplier > 0).all()) and (is_shared or isinstance(op, MaxPool))


def _exchanged(made: IntegerProgram, op: MaxPool | StridedPad | Concat, reader: Requantize) -> list[Op]:
    """Returns the operations in the other order; the tensors between them are new."""
    between = [f"{reader.output}/{op.output}/{i}" for i in range(len(op.inputs))]
    for name, source in zip(between, op.inputs):
        made.tensors[name] = replace(made.tensors[reader.output], name=name, shape=made.tensors[source].shape)
    first = [replace(reader, inputs=(source,), output=name) for name, source in zip(between, op.inputs)]
    if isinstance(op, StridedPad):
        op = replace(op, zero=requantize(reader, np.array([[op.zero[0]]]))[0])
    return [*first, replace(op, inputs=tuple(between), output=reader.output)]
