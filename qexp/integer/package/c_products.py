"""The C calls of products of tensors, multiples, other sizes of maps, norms and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qexp.integer.op import Ints, Op
from qexp.integer.package.c_code import Code, shape
from qexp.integer.products import Affine, Divide, MatMul, Multiply, Resample
from qexp.integer.statistics import Length, Normalize, Softmax, UnitLength


def _affine(code: Code, op: Affine) -> str:
    zero = (
        op.zero.reshape([-1 if k == op.axis else 1 for k in range(len(code.result))]) if op.zero.size > 1 else op.zero
    )
    values = {"factor": op.factor, "bias": op.bias, "zero": zero}
    axes = {k for v in values.values() if v.size > 1 for k, n in enumerate(v.shape) if n > 1}
    run = code.run(min(axes, default=0))
    if len(axes) > 1:  # constants for each element
        run = f"(qx_run){{1, {math.prod(code.result)}, 1}}"
        values = {k: np.broadcast_to(v, code.result) if v.size > 1 else v for k, v in values.items()}
    factor, bias, zero = (code.constant(name, v) for name, v in values.items())
    return f"qx_affine({code.xs[0]}, {run}, {factor}, {bias}, {zero}, {op.shift}, {code.y});"


def _multiply(code: Code, op: Multiply) -> str:
    steps = [_steps(source) for source in code.sources]
    length, a, b = (
        code.array("long", n, v) for n, v in (("length", code.result), ("stepa", steps[0]), ("stepb", steps[1]))
    )
    za, zb = (int(z) for z in op.zeros)
    return f"qx_multiply({code.xs[0]}, {code.xs[1]}, {len(code.result)}, {length}, {a}, {b}, {za}, {zb}, {code.y});"


def _divide(code: Code, op: Divide) -> str:
    length, step = code.array("long", "length", code.result), code.array("long", "step", _steps(code.sources[1]))
    za, zb = (int(z) for z in op.zeros)
    return f"qx_divide({code.xs[0]}, {code.xs[1]}, {len(code.result)}, {length}, {step}, {za}, {zb}, {op.fraction}, {code.y});"


def _steps(source: tuple[int, ...]) -> list[int]:
    """Returns the distance of neighbours along each dimension; 0 where one entry is repeated."""
    return [0 if n == 1 else math.prod(source[k + 1 :]) for k, n in enumerate(source)]


def _matmul(code: Code, op: MatMul) -> str:
    (*outer, m, k), n = code.sources[0], code.sources[1][-1]
    za, zb = (int(z) for z in op.zeros)
    return f"qx_matmul({code.xs[0]}, {code.xs[1]}, {math.prod(outer)}, {m}, {k}, {n}, {za}, {zb}, {code.y});"


def _resample(code: Code, op: Resample) -> str:
    def taps(places: Ints, weights: Ints, name: str) -> str:
        return f"{places.shape[1]}, {code.array('q64', name, places.ravel())}, {code.array('q64', f'{name}by', weights.ravel())}"

    rows, columns = taps(op.rows, op.row_weights, "rows"), taps(op.columns, op.column_weights, "columns")
    shapes = f"{shape(code.sources[0])}, {shape(code.result)}"
    return f"qx_resample({code.xs[0]}, {shapes}, {rows}, {columns}, {code.constant('zero', op.zero)}, {code.y});"


def _normalize(code: Code, op: Normalize) -> str:
    runs = f"{op.groups}, {math.prod(code.result) // op.groups}, {op.finer}, {op.fraction}, {op.eps}"
    each = f"{code.constant('sign', op.sign)}, {code.constant('bias', op.bias)}"
    return f"qx_normalize({code.xs[0]}, {runs}, {code.run(op.axis)}, {each}, {code.y});"


def _length(code: Code, op: Length) -> str:
    (shape,) = code.sources
    steps = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    kept = [k for k in range(len(shape)) if k not in op.axes]
    arrays = [
        code.array("long", name, [values[k] for k in axes])
        for name, values, axes in (
            ("kept", shape, kept),
            ("keptstep", steps, kept),
            ("gone", shape, op.axes),
            ("gonestep", steps, op.axes),
        )
    ]
    dims = f"{len(kept)}, {arrays[0]}, {arrays[1]}, {len(op.axes)}, {arrays[2]}, {arrays[3]}"
    return f"qx_length({code.xs[0]}, {dims}, {int(op.zero[0])}, {op.finer}, {code.y});"


def _unit_length(code: Code, op: UnitLength) -> str:
    return f"qx_unit_length({code.xs[0]}, {code.run(op.axis)}, {int(op.zero[0])}, {op.finer}, {op.fraction}, {op.least}, {code.y});"


def _softmax(code: Code, op: Softmax) -> str:
    table = code.array("q64", "table", op.table)
    return f"qx_softmax({code.xs[0]}, {code.run(op.axis)}, {table}, {op.fraction}, {code.y});"


PRODUCTS: dict[type[Op], Callable[[Code, Op], str]] = {
    Affine: _affine,
    Multiply: _multiply,
    Divide: _divide,
    MatMul: _matmul,
    Resample: _resample,
    Normalize: _normalize,
    Length: _length,
    UnitLength: _unit_length,
    Softmax: _softmax,
}
