"""A program under construction: its tensors, and the operations that turn one into another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.integer.arithmetic import FLOAT32, SUM_BITS, float32_factor, multiplier, requantized, width
from qexp.integer.grids import Grid, cannot, is_power_of_two
from qexp.integer.moves import Reshape
from qexp.integer.program import Add, IntegerProgram, Op, Requantize, TensorSpec

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]
ZERO = np.zeros(1, np.int64)  # of codes whose zero is 0
FLOAT_BITS = 52  # products below it are exact in float64, which fast executors use
WIDE_BITS = 31  # width of a tensor that is float in the simulation: one sign and 30 bits


@dataclass(frozen=True)
class Value:
    """A tensor of the program: real value of code q is `(q - zero) * unit`.

    Attributes:
        tensor: Its name; empty for the network's input before it has codes.
        unit, zero: One number or one per channel.
        low, high: Bounds of all codes, for any images.
        shape: Without the batch.
        most: Largest magnitude of the real values, one number or one per channel; None follows from `unit`, `low` and `high`.
        sums: Unit of a layer's sums as runtimes hold it (float32); None for other tensors.
        axis: Dimension of the channels, without the batch.
        runtimes: How runtimes round such sums.
        dims: Number of dimensions over which the channels spread, from `axis` on: 2 between the two reshapings of a channel shuffle.
        batch: Place of the batch in the network's tensor, which the program's tensor has first.
        lead: How many dimensions of an image the network's tensor holds in the batch's: 1 for `[N * windows, ...]`, `[windows, ...]` here.
        real: The numbers of a constant, which has no tensor in the program.
        left: Name of a tensor and what the rounding of a summand left out of it, where the simulation does not round there.
    """

    tensor: str
    unit: Reals
    zero: Ints
    low: int
    high: int
    shape: tuple[int, ...]
    most: Reals | None = None
    sums: NDArray[np.float32] | None = None
    axis: int = 0
    runtimes: str = FLOAT32
    dims: int = 1
    batch: int = 0
    lead: int = 0
    real: Reals | None = None
    left: tuple[str, Reals] | None = None

    @property
    def ndim(self) -> int:
        """Number of dimensions of the network's tensor."""
        return len(self.shape) + 1 - self.lead

    def axis_of(self, dim: int) -> int | None:
        """Returns the place in `shape` of a dimension of the network's tensor; None for the batch."""
        dim %= self.ndim
        return None if dim == self.batch else self.lead + dim - (dim > self.batch)

    @property
    def span(self) -> Reals:
        """The greatest magnitudes of the real values, one number or one per channel."""
        return self.reach * self.unit if self.most is None else self.most

    @property
    def reach(self) -> int:
        """The greatest distance of a code from the zero point."""
        zero = (int(self.zero.min()), int(self.zero.max()))
        return max(abs(self.high - zero[0]), abs(self.low - zero[1]), 1)

    @property
    def held(self) -> NDArray[np.float32] | None:
        """The unit as runtimes hold it in float32, of sums and of codes of a byte; None for other tensors."""
        return np.float32(self.unit) if self.sums is None and width(self.low, self.high) <= 8 else self.sums

    @property
    def even(self) -> bool:
        """Whether one unit holds for all channels."""
        return self.unit.size == 1

    @property
    def uniform(self) -> bool:
        """Whether one unit and one zero point hold for all channels."""
        return self.unit.size == 1 and self.zero.size == 1


class Writer:
    """Adds operations to a program.

    Args:
        as_runtimes: Requantize the sums of layers as runtimes do, in float32 (grids of at most 8 bits, ties to even).
    """

    def __init__(self, as_runtimes: bool = False) -> None:
        self.program, self.as_runtimes = IntegerProgram(), as_runtimes

    def emit(self, op: Op, value: Value) -> Value:
        """Adds an operation and the tensor it makes."""
        if width(value.low, value.high) > SUM_BITS + 1:
            raise cannot(
                op.layer,
                f"its sums can need {width(value.low, value.high)} bits, more than int64 holds",
                "use fewer bits",
            )
        self.program.ops.append(op)
        return self.declare(value)

    def declare(self, value: Value) -> Value:
        """Adds a tensor."""
        self.program.tensors[value.tensor] = TensorSpec(
            value.tensor,
            tuple(map(int, value.shape)),
            int(value.low),
            int(value.high),
            value.unit,
            value.zero,
            value.axis,
        )
        return value

    def fresh(self, name: str) -> str:
        """Returns a name that no tensor has yet."""
        names, n = self.program.tensors, 2
        if name not in names:
            return name
        while f"{name}#{n}" in names:
            n += 1
        return f"{name}#{n}"

    def joined(self, value: Value, layer: str) -> Value:
        """Returns a value whose channels, which spread over several dimensions, lie along one."""
        axis, end = value.axis, value.axis + value.dims
        channels = math.prod(value.shape[axis:end])
        return replace(self.reshaped(value, (*value.shape[:axis], channels, *value.shape[end:]), layer), dims=1)

    def reshaped(self, value: Value, shape: tuple[int, ...], layer: str) -> Value:
        """Returns a value in another shape, where its channels stay in place or have one unit."""
        op = Reshape(layer=layer, inputs=(value.tensor,), output=self.fresh(layer), shape=shape)
        return self.emit(op, replace(value, tensor=op.output, shape=shape))

    def maker(self, value: Value) -> Op | None:
        """Returns the operation that made a tensor, None if it is the input."""
        return next((op for op in self.program.ops if op.output == value.tensor), None)

    def value(self, name: str) -> Value:
        """Returns the value of a tensor."""
        t = self.program.tensors[name]
        return Value(t.name, t.unit, t.zero_point, t.low, t.high, t.shape, axis=t.axis)

    def requantize(self, value: Value, grid: Grid, layer: str, name: str) -> tuple[Value, Requantize | None]:
        """Returns the value on another grid, and the operation for it: None where it lies on that grid already."""
        same = np.array_equal(value.unit, grid.scale) and np.array_equal(value.zero, grid.zero)
        if same and value.low >= grid.low and value.high <= grid.high:
            return value, None
        if value.axis and not value.uniform and max(grid.scale.size, grid.zero.size) > 1:
            raise cannot(
                layer,
                "its channels, which come last, meet scales of another dimension",
                "use granularity: tensor there",
            )
        factor, shift, rounding = self._factor(value, grid)
        shift = np.broadcast_to(shift, np.broadcast_shapes(shift.shape, grid.zero.shape))
        op = Requantize(
            layer=layer,
            inputs=(value.tensor,),
            output=self.fresh(name),
            multiplier=factor,
            addend=grid.zero << shift,
            shift=shift,
            zero=value.zero,
            rounding=rounding,
            low=grid.low,
            high=grid.high,
            axis=value.axis if value.unit.size > 1 or value.zero.size > 1 else 0,
        )
        return self.apply(op, value, grid.scale, grid.zero), op

    def _factor(self, value: Value, grid: Grid) -> tuple[Ints, Ints, str]:
        """Returns multiplier and shift from a value's units to a grid's, and how the products are rounded."""
        narrow = grid.high - grid.low < 256 and grid.scale.size == 1 and grid.rounding == "half_even"
        if self.as_runtimes and narrow and value.held is not None:
            return *float32_factor(value.held / grid.scale.astype(np.float32)), value.runtimes
        reach = np.minimum(np.ceil(value.span / value.unit), value.reach)
        bits = np.clip(FLOAT_BITS - 1 - np.ceil(np.log2(np.maximum(reach, 1) + 1)), 16, 31).astype(np.int64)
        ratio = np.asarray(value.unit / grid.scale)
        return *multiplier(ratio, bits if ratio.size > 1 else bits.min()), grid.rounding

    def apply(self, op: Requantize, value: Value, unit: Reals, zero: Ints) -> Value:
        """Adds a requantization, after checking that int64 holds its products; its result has the codes it can reach."""
        reach = np.minimum(np.ceil(value.span / value.unit), value.reach)
        most = int((reach * np.abs(op.multiplier).astype(np.float64)).max()) + int(np.abs(op.addend).max())
        if most.bit_length() > SUM_BITS:
            raise cannot(
                op.layer, f"a product of its requantization can need {most.bit_length() + 1} bits", "use fewer bits"
            )
        ends = [
            requantized(np.int64(end) - op.zero, op.multiplier, op.addend, op.shift, op.rounding)
            for end in (value.low, value.high)
        ]
        low, high = (int(pick([int(pick(e)) for e in ends])) for pick in (np.min, np.max))  # a factor may be negative
        low, high = min(max(low, op.low), op.high), max(min(high, op.high), op.low)
        axis = op.axis if max(np.size(unit), np.size(zero)) > 1 else 0
        return self.emit(op, Value(op.output, unit, zero, low, high, value.shape, axis=axis))

    def settle(self, values: list[Value], layer: str, name: str, least_unit: float = 0.0) -> tuple[list[Value], list]:
        """Returns values whose units are one number each, powers of two that fit a common sum, and the operations used.

        It also handles tensors that are float in the simulation: they get the finest power-of-two step at which the sum of all of
        them stays within 31 bits, for any images.
        """
        if all(v.even and is_power_of_two(v.unit) for v in values):
            finest = min(float(v.unit[0]) for v in values)
            total = sum(v.reach * float(v.unit[0]) / finest for v in values)
            if total < 2.0**SUM_BITS:
                return values, [None] * len(values)
        if len({(float(v.unit[0]), v.even) for v in values}) == 1 and values[0].even:
            return values, [None] * len(values)  # one grid for all: codes add as they are
        spans = [np.asarray(v.span) for v in values]
        if len({span.size for span in spans if span.size > 1}) > 1:  # of parts with other numbers of channels
            spans = [span.max() for span in spans]
        total = float(np.max(sum(spans)))
        unit = 2.0 ** (np.ceil(np.log2(max(total, 1e-30))) - (WIDE_BITS - 1) + 1)
        unit = max(unit, least_unit)
        out, ops = [], []
        for i, v in enumerate(values):
            exact = v.even and is_power_of_two(v.unit) and float(v.unit[0]) >= unit
            half = 2**WIDE_BITS
            grid = Grid(np.array([unit]), np.zeros(1, np.int64), -half, half - 1, "half_even")
            new, op = (
                (v, None) if exact else self.requantize(v, grid, layer, f"{name}.{i}" if len(values) > 1 else name)
            )
            out.append(new)
            ops.append(op)
        return out, ops

    def add(self, values: list[Value], layer: str, finest: float | None = None) -> Value:
        """Returns the sum of values whose units are equal, or powers of two; in steps of the finest unit, or of a given one."""
        finest = finest or min(float(v.unit[0]) for v in values)
        shifts = [round(np.log2(float(v.unit[0]) / finest)) for v in values]
        low = sum((v.low - int(v.zero.max())) << s for v, s in zip(values, shifts))
        high = sum((v.high - int(v.zero.min())) << s for v, s in zip(values, shifts))
        if any(v.zero.size > 1 for v in values):
            raise cannot(layer, "an operand has one zero point per channel", "use granularity: tensor there")
        op = Add(
            layer=layer,
            inputs=tuple(v.tensor for v in values),
            output=self.fresh(layer),
            zeros=np.array([int(v.zero[0]) for v in values]),
            shifts=np.array(shifts),
        )
        return self.emit(op, Value(op.output, np.array([finest]), np.zeros(1, np.int64), low, high, values[0].shape))

    def rewrite(self, value: Value, **changes: Any) -> Value:
        """Changes the operation that made a tensor, and the tensor's value; no operation may have read it yet."""
        index = next(i for i, op in enumerate(self.program.ops) if op.output == value.tensor)
        self.program.ops[index] = replace(self.program.ops[index], **changes)
        return self.declare(value)
