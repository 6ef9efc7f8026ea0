"""The C calls of a program's operations that compute with weights, grids and windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qexp.errors import QexpError
from qexp.integer.op import Op
from qexp.integer.package.c_code import Code, numbers, shape
from qexp.integer.package.c_moves import MOVES
from qexp.integer.package.c_products import PRODUCTS
from qexp.integer.package.packing import coded
from qexp.integer.program import Add, Clamp, Conv, Linear, Lookup, MaxPool, Requantize, SumPool
from qexp.numerics.packing import pack


def call(code: Code, op: Op) -> str:
    """Returns the C statements of an operation; its constant arrays are added to the code.

    Raises:
        QexpError: There are none.
    """
    if type(op) not in CALLS:
        raise QexpError(f"export=package: {op.layer}: the operation {op.kind!r} has no C form")
    return CALLS[type(op)](code, op)


def _weighted(code: Code, op: Conv | Linear) -> str:
    (x,), (into,), out = code.xs, code.sources, code.result
    form = coded(op.weight)
    code.array("uint8_t", "weight", np.frombuffer(pack(form.codes, form.bits), np.uint8))
    bias, zero = code.constant("bias", op.bias).split(",")[0], code.constant("zero", op.zero)
    unpack = f"qx_unpack(weight{code.number}, {op.weight.size}, {form.bits}, {int(form.signed)}, weights);\n    "
    if form.levels is not None:
        rows, count = form.levels.shape
        code.array("int32_t", "levels", form.levels.ravel())
        unpack += f"qx_levels(weights, {rows}, {op.weight.size // rows}, levels{code.number}, {count});\n    "
    tail = f"weights, {bias}, {zero}"
    if isinstance(op, Conv):
        window = (*op.weight.shape[2:], *op.stride, *op.padding, *op.dilation, op.groups)
        return unpack + (
            f"qx_conv({x}, {shape(into)}, {tail}, (qx_window){{{numbers(window)}}}, {op.align}, {shape(out)}, {code.y});"
        )
    outputs, inputs = op.weight.shape
    one = f"(qx_window){{{numbers((1, 1, 1, 1, 0, 0, 1, 1, 1))}}}, {op.align}"
    rows = math.prod(out[:-1])
    if rows == 1:
        return unpack + f"qx_conv({x}, {shape((inputs,))}, {tail}, {one}, {shape((outputs,))}, {code.y});"
    return unpack + (
        f"for (long i = 0; i < {rows}; i++) qx_conv({x} + i * {inputs}, {shape((inputs,))}, {tail}, {one}, "
        f"{shape((outputs,))}, {code.y} + i * {outputs});"
    )


def _requantize(code: Code, op: Requantize) -> str:
    parts = ", ".join(code.constant(name, getattr(op, name)) for name in ("multiplier", "addend", "shift", "zero"))
    rounding = f"QX_{op.rounding.upper()}"
    return f"qx_requantize({code.xs[0]}, {code.run(op.axis)}, {parts}, {rounding}, {op.low}, {op.high}, {code.y});"


def _clamp(code: Code, op: Clamp) -> str:
    limits = f"{code.constant('low', op.low)}, {code.constant('high', op.high)}"
    return f"qx_clamp({code.xs[0]}, {code.run(op.axis)}, {limits}, {code.y});"


def _add(code: Code, op: Add) -> str:
    size = math.prod(code.result)
    adds = [f"qx_add({x}, {size}, {int(z)}, {int(s)}, {code.y});" for x, z, s in zip(code.xs, op.zeros, op.shifts)]
    return "\n    ".join([f"memset({code.y}, 0, {size} * sizeof(q64));", *adds])


def _pool(code: Code, op: MaxPool | SumPool) -> str:
    dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
    window = f"(qx_window){{{numbers((*op.window, *op.stride, *op.padding, *dilation, 1))}}}"
    zero = "" if isinstance(op, MaxPool) else code.constant("zero", op.zero) + ", "
    name = "qx_max_pool" if isinstance(op, MaxPool) else "qx_sum_pool"
    return f"{name}({code.xs[0]}, {shape(code.sources[0])}, {window}, {zero}{shape(code.result)}, {code.y});"


def _lookup(code: Code, op: Lookup) -> str:
    table = code.constant("table", op.table).split(",")[0]
    rows, entries = np.atleast_2d(op.table).shape
    return f"qx_lookup({code.xs[0]}, {code.run(op.axis)}, {table}, {rows}, {entries}, {op.low}, {code.y});"


CALLS: dict[type[Op], Callable[[Code, Op], str]] = {
    Conv: _weighted,
    Linear: _weighted,
    Requantize: _requantize,
    Clamp: _clamp,
    Add: _add,
    MaxPool: _pool,
    SumPool: _pool,
    Lookup: _lookup,
    **MOVES,
    **PRODUCTS,
}
