"""Makes one function of a region: from sums of convolutions and codes to the codes that the next layers read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from qexp_kernels.fused_conv import Products, fused_conv
from qexp_kernels.regrid import MOST, STEPS, Pass, Step
from qexp_kernels.regrid.reference import TABLE
from torch import Tensor

from qexp.integer import int8
from qexp.integer.arithmetic import RUNTIMES
from qexp.integer.bounds import partial_sums
from qexp.integer.lines import Codes, Line, bytes_at, limits_behind, line_of, mapped, straight
from qexp.integer.machine import DOUBLE, Machine, Stored
from qexp.integer.op import Op
from qexp.integer.program import Add, Clamp, Conv, Linear, Lookup, Requantize
from qexp.integer.reference import COMPUTE
from qexp.integer.regions import Region

PLACES = ("source", "target", "other")  # fields of a step
Sums = Callable[[Tensor], Tensor]
Run = Callable[..., list[Tensor]]


class _NotFused(Exception):
    """A region has no such function."""


def fused(machine: Machine, region: Region, sums: Callable[[Machine, Conv | Linear], Sums | None]) -> Run | None:
    """Returns a region as one function, from its inputs to the tensors it leaves, as they are kept; None if this is not exact.

    Args:
        machine: Program and number types.
        region: The operations.
        sums: Makes the function that computes a layer's sums of products; None where no floating type holds them.
    """
    try:
        return _Writer(machine, region, sums).written()
    except _NotFused:
        return None


class _Writer:
    """Translates the operations of a region one by one into steps of `regrid`."""

    def __init__(self, machine: Machine, region: Region, sums: Callable[[Machine, Conv | Linear], Sums | None]) -> None:
        self.machine, self.region, self.sums = machine, region, sums
        self.reads: list[tuple[str, Sums | None]] = []  # what each input place holds: a tensor, or sums of it
        self.head: Products | None = None  # the first place, if its sums are computed in the pass
        self.values: dict[str, Line | Codes] = {}
        self.steps: list[Step] = []
        self.constants: list[Tensor] = []
        self.tables: list[Tensor] = []
        self.between = 0
        if not region.leaves:
            raise _NotFused

    def written(self) -> Run:
        """Returns the finished function."""
        for op in self.region.ops:
            value = self._value(op)
            if op.output in self.region.leaves:
                value = self._left(op.output, value)
            self.values[op.output] = value
        results = self._once()
        made = sorted(set(results))
        if not 1 <= len(self.reads) <= MOST or max(self.between, len(made)) > MOST or len(self.steps) > STEPS:
            raise _NotFused
        device, dtypes = self.machine.device, [self._leaf(100 + k).dtype for k in made]
        steps = [s._replace(**{field: self._number(getattr(s, field), made) for field in PLACES}) for s in self.steps]
        constants, tables = ([t.to(device) for t in given] for given in (self.constants, self.tables))
        regrid, which = Pass(steps, dtypes, constants, tables), [made.index(k) for k in results]
        reads = [(self.region.inputs.index(name), sums) for name, sums in self.reads]

        def read(given: tuple[Tensor, ...], first: int) -> list[Tensor]:
            return [given[i] if sums is None else sums(given[i]) for i, sums in reads[first:]]

        def run(*given: Tensor) -> list[Tensor]:
            if self.head is None:
                found = regrid(read(given, 0))
            else:
                x = given[reads[0][0]]
                is_flat = x.dim() == 2  # of a linear layer
                others = [y[:, :, None, None] if is_flat else y for y in read(given, 1)]
                found = fused_conv(x[:, :, None, None] if is_flat else x, self.head, regrid, others)
                found = [y.flatten(1) for y in found] if is_flat else found
            return [found[k] for k in which]

        return run

    def _once(self) -> list[int]:
        """Drops steps that repeat an earlier one; returns the number of the leaf that holds each leaf.

        Two layers often read a tensor on the same grid, such as a convolution and the addition around it.
        """
        same: dict[int, int] = {}  # place -> an earlier place of the same numbers
        steps: dict[tuple, Step] = {}
        for step in self.steps:
            step = step._replace(source=same.get(step.source, step.source), other=same.get(step.other, step.other))
            numbers = (self.tables if step.kind == TABLE else self.constants)[step.at]
            dtype = self._leaf(step.target).dtype if step.target < 200 else None  # bytes in between
            first = steps.setdefault((step.kind, step.source, step.other, numbers.numpy().tobytes(), dtype), step)
            same[step.target] = first.target
        self.steps = list(steps.values())
        return [same[100 + k] - 100 for k in range(len(self.region.leaves))]

    def _leaf(self, place: int) -> Stored:
        """Returns how the result at a place is kept."""
        return self.machine.stored(self.region.leaves[place - 100])

    # Places: inputs are 0, 1, ..., results 100, 101, ..., bytes in between 200, 201, ...; numbered anew once all are known.

    def _number(self, place: int, made: list[int]) -> int:
        if place < 100:
            return place
        return len(self.reads) + (made.index(place - 100) if place < 200 else len(made) + place - 200)

    def _target(self, name: str) -> int:
        if name in self.region.leaves:
            return 100 + self.region.leaves.index(name)
        self.between += 1
        return 199 + self.between

    def _read(self, name: str, sums: Sums | None = None) -> int:
        self.reads.append((name, sums))
        return len(self.reads) - 1

    def _value(self, op: Op) -> Line | Codes:
        shapes = {self.machine.program.tensors[name].shape for name in (op.output, *op.inputs)}
        by_channel = any(isinstance(v, np.ndarray) and v.size > 1 for v in vars(op).values())
        if isinstance(op, Linear):
            if len(self.machine.program.tensors[op.output].shape) > 1:  # its channels come last
                raise _NotFused
        elif not isinstance(op, Conv) and (len(shapes) > 1 or (by_channel and getattr(op, "axis", 0))):
            raise _NotFused
        if isinstance(op, Conv | Linear):
            return self._head(op)
        values = [self._input(name) for name in op.inputs]
        if isinstance(op, Clamp) and isinstance(values[0], Line):
            return values[0].clamped(op)
        if isinstance(op, Requantize) and isinstance(values[0], Line):
            return self._requantized(op, values[0])
        codes = [v for v in values if isinstance(v, Codes)]
        if len(codes) < len(values):
            raise _NotFused
        return self._tabulated(op, codes)

    def _input(self, name: str) -> Line | Codes:
        """Returns what a tensor is; one from outside is read once."""
        if name not in self.values:
            spec, stored = self.machine.program.tensors[name], self.machine.stored(name)
            if stored.dtype is torch.int64:
                raise _NotFused
            place = self._read(name)
            if stored.dtype is torch.uint8:
                self.values[name] = bytes_at(place, stored.offset, spec.low, spec.high)
            else:
                self.values[name] = line_of(place, 1, np.zeros(1, np.int64), max(abs(spec.low), abs(spec.high)))
        return self.values[name]

    def _head(self, op: Conv | Linear) -> Line:
        sums = None if op.unit or self.machine.accumulator is not None else self.sums(self.machine, op)
        if sums is None:
            raise _NotFused
        source = self.machine.program.tensors[op.inputs[0]]
        most = max(map(abs, partial_sums(op, source.low, source.high))) << op.align
        most += int(np.abs(op.bias).max(initial=0))
        if most >= DOUBLE:
            raise _NotFused
        place = self._read(op.inputs[0], sums)
        if place == 0 and self.machine.in_bytes(op):
            self.head = int8.products(op, source.low, source.high)
        return line_of(place, 1 << op.align, op.bias, most)

    def _requantized(self, op: Requantize, line: Line) -> Line | Codes:
        """One step: its result is bytes, or a tensor that others read."""
        constants, limits = mapped(op, line.most), limits_behind(op, line)
        if constants is None or limits is None or op.rounding in RUNTIMES:
            raise _NotFused
        factor, summand = constants
        spec, (dtype, offset) = self.machine.program.tensors[op.output], self.machine.stored(op.output)
        is_byte = spec.high + offset <= 255 and spec.low + offset >= 0
        if (not is_byte and op.output not in self.region.leaves) or dtype is torch.int64:
            raise _NotFused
        low, high = (np.clip(v, spec.low, spec.high) for v in limits)  # no others can come
        target = self._target(op.output)
        kept = offset if dtype is torch.uint8 or op.output not in self.region.leaves else 0
        self._step(
            op.rounding, line.place, target, factor * line.factor, summand + factor * line.summand, low, high, kept
        )
        if not is_byte or (op.output in self.region.leaves and dtype is not torch.uint8):
            return line_of(target, 1, np.zeros(1, np.int64), max(abs(spec.low), abs(spec.high)))
        return bytes_at(target, offset, spec.low, spec.high)

    def _tabulated(self, op: Op, values: list[Codes]) -> Codes:
        """An operation on tables: the definition computes it for every byte or pair of bytes."""
        places = tuple(dict.fromkeys(place for v in values for place in v.places))
        if len(places) > 2 or not isinstance(op, Requantize | Clamp | Add | Lookup):
            raise _NotFused
        if isinstance(op, Requantize) and max(v.size for v in (op.multiplier, op.addend, op.shift, op.zero)) > 1:
            raise _NotFused
        if isinstance(op, Clamp) and max(op.low.size, op.high.size) > 1:
            raise _NotFused
        if isinstance(op, Lookup) and op.table.ndim > 1:
            raise _NotFused
        within = {place: range_ for v in values for place, range_ in zip(v.places, v.within)}
        values = [v.over(places, tuple(within[p] for p in places)) for v in values]
        table = COMPUTE[type(op)](op, *(v.table.reshape(1, 1, -1) for v in values)).reshape(values[0].table.shape)
        slopes, height = _rough(op, values)
        return Codes(places, table, values[0].within, slopes, height)

    def _left(self, name: str, value: Line | Codes) -> Line | Codes:
        """Writes a tensor that others read, if it is not yet there; returns what it is to later operations."""
        target = 100 + self.region.leaves.index(name)
        if any(step.target == target for step in self.steps):
            return value
        spec, (dtype, offset) = self.machine.program.tensors[name], self.machine.stored(name)
        if dtype is torch.int64:
            raise _NotFused
        offset = offset if dtype is torch.uint8 else 0
        if isinstance(value, Line):
            low, high = (np.clip(v, spec.low, spec.high) for v in (value.low, value.high))
            self._step("none", value.place, target, value.factor, value.summand, low, high, offset)
            return value
        found = straight(value)
        if found is not None:
            slopes, summand, low, high = found
            second = slopes[1] if len(slopes) > 1 else 0.0
            other = value.places[1] if len(slopes) > 1 else -1
            self._step("half_even", value.places[0], target, slopes[0], summand, low, high, offset, second, other)
        elif dtype is torch.uint8:
            self.tables.append(torch.from_numpy((value.table + offset).clip(0, 255).astype(np.uint8).ravel()))
            other = value.places[1] if len(value.places) > 1 else -1
            self.steps.append(Step("table", value.places[0], target, len(self.tables) - 1, other))
        else:
            raise _NotFused
        return bytes_at(target, offset, spec.low, spec.high) if dtype is torch.uint8 else value

    def _step(
        self, kind: str, source: int, target: int, factor, summand, low, high, after, second=0.0, other=-1
    ) -> None:
        rows = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(v, np.float64)) for v in (factor, summand, low, high, after, second))
        )
        self.constants.append(torch.from_numpy(np.stack(rows)))
        self.steps.append(Step(kind, source, target, len(self.constants) - 1, other))


def _rough(op: Op, values: list[Codes]) -> tuple[tuple[float, ...] | None, float]:
    """Returns the line of real numbers that an operation on tables rounds and clips: slopes, summand."""
    if isinstance(op, Lookup) or any(v.slopes is None for v in values):
        return None, 0.0
    if isinstance(op, Clamp):
        return values[0].slopes, values[0].height
    if isinstance(op, Requantize):
        factor = float(np.ldexp(float(op.multiplier[0]), -int(op.shift[0])))
        summand = (
            float(np.ldexp(float(op.addend[0]), -int(op.shift[0])))
            if op.rounding not in RUNTIMES
            else float(op.addend[0] >> op.shift[0])
        )
        return tuple(s * factor for s in values[0].slopes), (values[0].height - float(op.zero[0])) * factor + summand
    scales = [float(1 << int(k)) for k in op.shifts]
    slopes = tuple(sum(v.slopes[i] * s for v, s in zip(values, scales)) for i in range(len(values[0].slopes)))
    return slopes, sum((v.height - float(z)) * s for v, z, s in zip(values, op.zeros, scales))
