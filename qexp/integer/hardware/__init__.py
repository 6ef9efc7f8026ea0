"""Units that compute a layer's sums in their own way: width-true, not cycle-true. An operation names its unit, the executors ask here.

A unit is a function `(op, x, register) -> result` on NumPy integers, `x` with its zero point taken off; it is chosen by the recipe the
network was simulated with, or put into a program by `with_unit`, to see what other hardware makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qexp.errors import QexpError
from qexp.integer.hardware import fixed_point, shift, winograd
from qexp.integer.program import Conv, IntegerProgram, Linear

UNITS: dict[str, Callable] = {"fixed_point": fixed_point.sums, "winograd": winograd.sums, "shift": shift.sums}
OPTIONS: dict[str, Callable[[IntegerProgram, Conv | Linear, dict[str, Any]], dict[str, Any] | None]] = {
    "winograd": winograd.unit,
    "shift": shift.unit,
}


def with_unit(program: IntegerProgram, name: str, **options: Any) -> IntegerProgram:
    """Returns the program with every layer that can on another unit; results keep their meaning.

    Args:
        program: A program whose layers compute plainly.
        name: `winograd` (outputs, two_d, clamp_int16) or `shift` (inflation, negative).
        options: Of the unit.

    Raises:
        QexpError: No such unit, or no layer that it can compute.
    """
    if name not in OPTIONS:
        raise QexpError(f"unit {name!r}; allowed are {', '.join(OPTIONS)}")
    ops, moved = [], 0
    for op in program.ops:
        unit = OPTIONS[name](program, op, options) if isinstance(op, Conv | Linear) and not op.unit else None
        moved += unit is not None
        ops.append(op if unit is None else replace(op, unit={"name": name, **unit}))
    if not moved:
        raise QexpError(f"no layer of this program can run on the {name} unit")
    return replace(program, ops=ops)
