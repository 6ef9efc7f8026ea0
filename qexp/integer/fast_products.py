"""The functions of a fast executor for products of two tensors and for other sizes of maps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qexp.integer.machine import Machine
from qexp.integer.op import Op
from qexp.integer.products import Affine, Divide, MatMul, Multiply, Resample


def _apart(fast: Machine, op: Multiply | MatMul) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Returns the distances of both operands' codes from their zeros as a function, in a type that holds the products exactly."""
    specs = [fast.program.tensors[name] for name in op.inputs]
    reach = [max(abs(s.low - int(z)), abs(s.high - int(z)), 1) for s, z in zip(specs, op.zeros)]
    terms = specs[0].shape[-1] if isinstance(op, MatMul) else 1
    dtype = fast.exact(op.output, most=reach[0] * reach[1] * terms)
    zeros = [int(z) for z in op.zeros]
    return lambda *xs: [x.to(dtype) - z if z else x.to(dtype) for x, z in zip(xs, zeros)]


def _affine(fast: Machine, op: Affine) -> Callable[..., Tensor]:
    dtype = fast.exact(op.output, *op.inputs)
    zero = fast.constant(op.zero, dtype, fast.ndim(op.inputs[0]), op.axis)
    factor, bias = (torch.from_numpy(np.array(v)).to(fast.device, dtype) for v in (op.factor << op.shift, op.bias))
    return lambda x: (x.to(dtype) - zero) * factor + bias


def _multiply(fast: Machine, op: Multiply) -> Callable[..., Tensor]:
    apart = _apart(fast, op)

    def step(a: Tensor, b: Tensor) -> Tensor:
        a, b = apart(a, b)
        return a * b

    return step


def quotient(op: Divide, a: Tensor, b: Tensor) -> Tensor:
    """Returns quotients of codes, int64."""
    a, b = a.long() - int(op.zeros[0]), b.long() - int(op.zeros[1])
    size = b.abs().clamp_min(1)
    return torch.div(((a * b.sign()) << (op.fraction + 1)) + size, 2 * size, rounding_mode="floor") * (b != 0)


def _divide(fast: Machine, op: Divide) -> Callable[..., Tensor]:
    dtype = fast.exact(op.output)
    return lambda a, b: quotient(op, a, b).to(dtype)


def _matmul(fast: Machine, op: MatMul) -> Callable[..., Tensor]:
    apart = _apart(fast, op)

    def step(a: Tensor, b: Tensor) -> Tensor:
        a, b = apart(a, b)
        return a @ b

    return step


def _resample(fast: Machine, op: Resample) -> Callable[..., Tensor]:
    if op.copies and not op.zero.any() and (op.row_weights == 1).all() and (op.column_weights == 1).all():
        places = [torch.from_numpy(v[:, 0].copy()).to(fast.device) for v in (op.rows, op.columns)]
        return lambda x: x.index_select(2, places[0]).index_select(3, places[1])
    spec = fast.program.tensors[op.inputs[0]]
    reach = max(abs(spec.low - int(op.zero.max())), abs(spec.high - int(op.zero.min())), 1)
    weights = [int(np.abs(w).sum(1).max()) for w in (op.row_weights, op.column_weights)]
    dtype = fast.exact(op.output, most=reach * weights[0] * weights[1])
    dtype = torch.float64 if dtype is torch.float32 else dtype
    zero = fast.constant(op.zero, dtype, 4)
    rows, columns = (
        [
            (torch.from_numpy(a.copy()).to(fast.device), torch.from_numpy(w.copy()).to(fast.device, dtype))
            for a, w in zip(at.T, by.T)
        ]
        for at, by in ((op.rows, op.row_weights), (op.columns, op.column_weights))
    )

    def step(x: Tensor) -> Tensor:
        x = x.to(dtype) - zero
        x = sum(x.index_select(2, at) * by[:, None] for at, by in rows)
        return sum(x.index_select(3, at) * by for at, by in columns)

    return step


PRODUCTS: dict[type[Op], Callable[[Machine, Op], Callable[..., Tensor]]] = {
    Affine: _affine,
    Multiply: _multiply,
    Divide: _divide,
    MatMul: _matmul,
    Resample: _resample,
}
