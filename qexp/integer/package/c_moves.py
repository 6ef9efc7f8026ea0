"""The C calls of operations that only move codes."""

from __future__ import annotations

import math
from collections.abc import Callable

from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad, moved
from qexp.integer.op import Op
from qexp.integer.package.c_code import Code, numbers, shape


def _concat(code: Code, op: Concat) -> str:
    outer, total = math.prod(code.result[: op.axis]), math.prod(code.result[op.axis :])
    copies, at = [], 0
    for x, source in zip(code.xs, code.sources):
        size = math.prod(source[op.axis :])
        copies.append(f"qx_place({x}, {outer}, {size}, {total}, {code.y} + {at});")
        at += size
    return "\n    ".join(copies)


def _same(code: Code, op: Flatten | Reshape) -> str:
    return f"memmove({code.y}, {code.xs[0]}, {math.prod(code.result)} * sizeof(q64));"


def _strided_pad(code: Code, op: StridedPad) -> str:
    into, out = shape(code.sources[0]), shape(code.result)
    return f"qx_strided_pad({code.xs[0]}, {into}, {op.stride}, {op.before}, {int(op.zero[0])}, {out}, {code.y});"


def _moved(code: Code, op: Permute | Slice | Pad) -> str:
    walks = moved(op, code.sources[0])
    each = ", ".join(f"{{{numbers((w.length, w.first, w.step, w.size, w.stride))}}}" for w in walks)
    name = f"walk{code.number}"
    code.arrays.append(f"static const qx_walk {name}[] = {{{each}}};")
    fill = op.value if isinstance(op, Pad) else 0
    return f"qx_move({code.xs[0]}, {len(walks)}, {name}, {fill}, {code.y});"


MOVES: dict[type[Op], Callable[[Code, Op], str]] = {
    Concat: _concat,
    Flatten: _same,
    Reshape: _same,
    StridedPad: _strided_pad,
    Permute: _moved,
    Slice: _moved,
    Pad: _moved,
}
