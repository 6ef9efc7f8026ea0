"""Units that compute a layer's sums as special hardware does: exact in width, not in cycles. Executors find them here by name.

A unit is a function `(op, x, register) -> result` on NumPy integers, `x` without its zero point. The recipe of the simulated
network chooses it, or `with_unit` puts it into a program, to compute the results of other hardware.
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
    """Returns the program with another unit on every layer that it can compute; results keep their meaning.

    Args:
        program: A program with ordinary layers.
        name: `winograd` (outputs, two_d, clamp_int16) or `shift` (inflation, negative).
        options: Options of the unit.

    Raises:
        QexpError: The unit does not exist, or it cannot compute any layer.
    """
    if name not in OPTIONS:
        raise QexpError(f"unit={name!r} is not allowed; use {' or '.join(OPTIONS)}")
    ops, moved = [], 0
    for op in program.ops:
        unit = OPTIONS[name](program, op, options) if isinstance(op, Conv | Linear) and not op.unit else None
        moved += unit is not None
        ops.append(op if unit is None else replace(op, unit={"name": name, **unit}))
    if not moved:
        raise QexpError(f"no layer of this program can run on the {name} unit")
    return replace(program, ops=ops)
