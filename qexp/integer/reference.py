"""The definition of a program's arithmetic: NumPy integers, one short function per operation, no floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import requantized
from qexp.integer.hardware import UNITS
from qexp.integer.op import Op
from qexp.integer.products import Affine, Divide, MatMul, Multiply, Resample
from qexp.integer.program import (
    Add,
    Clamp,
    Conv,
    IntegerProgram,
    Linear,
    Lookup,
    MaxPool,
    Requantize,
    SumPool,
    channels,
)
from qexp.integer.reference_moves import MOVES
from qexp.integer.reference_statistics import STATISTICS
from qexp.integer.register import Accumulator, taps

Ints = NDArray[np.int64]


class Reference:
    """Runs a program on codes: `run(codes)` returns the codes of the scores.

    Args:
        program: The program to run.
        accumulator: The register of convolutions and linear layers; by default one that never overflows.
    """

    def __init__(self, program: IntegerProgram, accumulator: Accumulator | None = None) -> None:
        self.program, self.accumulator = program, accumulator or Accumulator()

    def run(self, codes: Ints, keep: Callable[[str, Ints], None] | None = None) -> Ints:
        """Returns the codes of the scores.

        Args:
            codes: Codes of the images `[N, C, H, W]`, from `program.encode`.
            keep: Function called with the name and codes of every tensor, in order.
        """
        spec = self.program.tensors[self.program.input]
        codes = _whole(codes)
        if codes.shape[1:] != spec.shape or (codes.size and not (codes.min() >= spec.low and codes.max() <= spec.high)):
            raise QexpError(
                f"{spec.name}: got codes {list(codes.shape)}; needed are [N, {', '.join(map(str, spec.shape))}] in "
                f"{spec.low}..{spec.high}"
            )
        tensors, last = {spec.name: codes}, self.program.last_use()
        if keep:
            keep(spec.name, codes)
        for i, op in enumerate(self.program.ops):
            y = _whole(self.compute(op, [tensors[name] for name in op.inputs]))
            tensors[op.output] = y
            if keep:
                keep(op.output, y)
            for name in op.inputs:
                if last[name] == i and name != self.program.output:
                    tensors.pop(name, None)
        return tensors[self.program.output]

    def compute(self, op: Op, xs: list[Ints]) -> Ints:
        """Returns the result of one operation."""
        if isinstance(op, Conv | Linear):
            return self.weighted(op, xs[0])
        return COMPUTE[type(op)](op, *xs)

    def weighted(self, op: Conv | Linear, x: Ints) -> Ints:
        """Returns the sums of a convolution or linear layer."""
        axis = x.ndim - 2 if isinstance(op, Linear) else 0
        x = x - channels(op.zero, x.ndim, axis)
        if op.unit:
            return UNITS[op.unit["name"]](op, x, self.accumulator)
        total = self.accumulator.sum(op.layer, taps(op, x))
        return (total << op.align) + channels(op.bias, total.ndim, axis)


def requantize(op: Requantize, x: Ints) -> Ints:
    """Returns codes on another grid."""
    zero, factor, addend, shift = (channels(v, x.ndim, op.axis) for v in (op.zero, op.multiplier, op.addend, op.shift))
    return requantized(x - zero, factor, addend, shift, op.rounding).clip(op.low, op.high)


def clamp(op: Clamp, x: Ints) -> Ints:
    """Returns codes between two limits."""
    return x.clip(channels(op.low, x.ndim, op.axis), channels(op.high, x.ndim, op.axis))


def add(op: Add, *xs: Ints) -> Ints:
    """Returns the sum of operands."""
    return sum((x - zero) << shift for x, zero, shift in zip(xs, op.zeros, op.shifts))


def windows(x: Ints, op: MaxPool | SumPool, dilation: tuple[int, int], shape: tuple[int, int], beyond: int) -> Ints:
    """Returns the windows of a pooling `[N, C, h, w, kh, kw]`; what lies beyond the border is `beyond`."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = op.window, op.stride, op.padding, dilation
    need = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(shape, op.stride, dilation, op.window)]
    right = [max(n - size - p, 0) for n, size, p in zip(need, x.shape[2:], op.padding)]
    x = np.pad(x, ((0, 0), (0, 0), (ph, right[0]), (pw, right[1])), constant_values=beyond)
    seen = sliding_window_view(x, (dh * (kh - 1) + 1, dw * (kw - 1) + 1), axis=(2, 3))
    return seen[:, :, : need[0] : sh, : need[1] : sw, ::dh, ::dw][:, :, : shape[0], : shape[1]]


def count(size: int, window: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Returns how many windows fit along an axis."""
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


def sum_pool(op: SumPool, x: Ints) -> Ints:
    """Returns the sum of each window."""
    shape = tuple(map(count, x.shape[2:], op.window, op.stride, op.padding))
    return windows(x - channels(op.zero, x.ndim), op, (1, 1), shape, 0).sum((4, 5))


def max_pool(op: MaxPool, x: Ints) -> Ints:
    """Returns the greatest code of each window."""
    return windows(x, op, op.dilation, op.size, np.iinfo(np.int64).min).max((4, 5))


def lookup(op: Lookup, x: Ints) -> Ints:
    """Returns the table's entries."""
    if op.table.ndim == 1:
        return op.table[x - op.low]
    return op.table[channels(np.arange(len(op.table)), x.ndim, op.axis), x - op.low]


def affine(op: Affine, x: Ints) -> Ints:
    """Returns a multiple plus a constant."""
    return (((x - channels(op.zero, x.ndim, op.axis)) * op.factor) << op.shift) + op.bias


def multiply(op: Multiply, a: Ints, b: Ints) -> Ints:
    """Returns the product number by number."""
    return (a - op.zeros[0]) * (b - op.zeros[1])


def divide(op: Divide, a: Ints, b: Ints) -> Ints:
    """Returns the quotient number by number."""
    a, b = a - op.zeros[0], b - op.zeros[1]
    size = np.maximum(np.abs(b), 1)
    return np.where(b == 0, 0, (((a * np.sign(b)) << (op.fraction + 1)) + size) // (2 * size))


def matmul(op: MatMul, a: Ints, b: Ints) -> Ints:
    """Returns the product of matrices."""
    return (a - op.zeros[0]) @ (b - op.zeros[1])


def resample(op: Resample, x: Ints) -> Ints:
    """Returns maps of another size: rows first, then columns."""
    x = x - channels(op.zero, x.ndim)
    rows = sum(x[:, :, at] * by[:, None] for at, by in zip(op.rows.T, op.row_weights.T))
    return sum(rows[:, :, :, at] * by for at, by in zip(op.columns.T, op.column_weights.T))


COMPUTE: dict[type[Op], Callable[..., Ints]] = {
    Requantize: requantize,
    Clamp: clamp,
    Add: add,
    SumPool: sum_pool,
    MaxPool: max_pool,
    Lookup: lookup,
    Affine: affine,
    Multiply: multiply,
    Divide: divide,
    MatMul: matmul,
    Resample: resample,
    **MOVES,
    **STATISTICS,
}


def _whole(x: Ints) -> Ints:
    """Returns the array after checking that it holds integers, which all tensors of a program must."""
    if not isinstance(x, np.ndarray) or x.dtype != np.int64:
        raise QexpError(f"integers (int64) are needed, got {getattr(x, 'dtype', type(x).__name__)}")
    return x
