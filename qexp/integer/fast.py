"""The same program, fast: convolutions in floating point where that is provably exact, the rest on integers; bit for bit the reference.

A sum of integer products whose every partial sum stays below 2^24 is exact in float32 in whatever order it is added, below 2^53 in
float64: which of the two a layer takes is settled beforehand, from its weights and the codes that can arrive. The same holds for a
requantization, whose product of accumulator and multiplier is exact in float64 below 2^53.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qexp.integer.arithmetic import limit, shift_round
from qexp.integer.bounds import partial_sums
from qexp.integer.program import (
    Add,
    Clamp,
    Concat,
    Conv,
    Flatten,
    IntegerProgram,
    Linear,
    Lookup,
    MaxPool,
    Op,
    Requantize,
    StridedPad,
    SumPool,
)
from qexp.integer.reference import Accumulator, Reference

_SINGLE, _DOUBLE = 2**24, 2**53


class Fast:
    """Runs a program with PyTorch: `run(codes)` returns the codes of the scores, int64.

    Args:
        program: What to run.
        accumulator: A narrower register, at the end of each sum (`point="end"`); by default one that never overflows.
        device: Where.
    """

    def __init__(
        self, program: IntegerProgram, accumulator: Accumulator | None = None, device: str | torch.device = "cpu"
    ) -> None:
        self.program, self.accumulator, self.device = program, accumulator, torch.device(device)
        self.steps = [self._prepare(op) for op in program.ops]
        self.last = program.last_use()

    @torch.inference_mode()
    def run(self, codes: NDArray[np.int64] | Tensor, keep: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Returns the codes of the scores; `keep` is called with the name and codes (whole numbers, any dtype) of every tensor."""
        codes = torch.as_tensor(codes)
        tensors = {self.program.input: codes.to(self.device, torch.float32)}
        if keep:
            keep(self.program.input, codes)
        for i, (op, step) in enumerate(zip(self.program.ops, self.steps)):
            y = step(*(tensors[name] for name in op.inputs))
            tensors[op.output] = y
            if keep:
                keep(op.output, y)
            for name in op.inputs:
                if self.last[name] == i and name != self.program.output:
                    tensors.pop(name, None)
        return tensors[self.program.output].long()

    def exact(self, *tensors: str, most: int = 0) -> torch.dtype:
        """Returns the narrowest floating type that holds all codes of some tensors, or integers up to `most`."""
        specs = [self.program.tensors[t] for t in tensors]
        most = max([most, *(max(abs(s.low), abs(s.high)) for s in specs)])
        if most < _SINGLE:
            return torch.float32
        return torch.float64 if most < _DOUBLE else torch.int64

    def _prepare(self, op: Op) -> Callable[..., Tensor]:
        return _STEPS[type(op)](self, op)

    def constant(self, values: NDArray, dtype: torch.dtype, ndim: int) -> Tensor:
        """Returns a constant that broadcasts against `[N, C, ...]`."""
        tensor = torch.from_numpy(np.array(values)).to(self.device, dtype)
        return tensor.reshape(1, -1, *[1] * (ndim - 2)) if tensor.numel() > 1 else tensor.reshape([1] * ndim)

    def ndim(self, name: str) -> int:
        """Returns the dimensions of a tensor, the batch included."""
        return len(self.program.tensors[name].shape) + 1


def _weighted(fast: Fast, op: Conv | Linear) -> Callable[..., Tensor]:
    if op.unit:
        return _own_unit(fast, op)
    source = fast.program.tensors[op.inputs[0]]
    low, high = partial_sums(op, source.low, source.high)
    widest = max(abs(source.low - int(op.zero.max())), abs(source.high - int(op.zero.min())))
    dtype = fast.exact(most=max(widest, int(np.abs(op.weight).max(initial=0)), -low, high))
    if dtype is torch.int64:  # beyond 53 bits: as the reference
        return lambda x: torch.from_numpy(Reference(fast.program).weighted(op, x.cpu().long().numpy())).to(fast.device)
    after = fast.exact(op.output, most=max(-low, high) << op.align)
    weight = torch.from_numpy(op.weight).to(fast.device, dtype)
    joined = after is dtype and op.align == 0  # then the bias joins inside
    bias = torch.from_numpy(np.array(op.bias)).to(fast.device, after)
    spread = bias.reshape(1, -1, *[1] * (fast.ndim(op.output) - 2))
    zero = fast.constant(op.zero, dtype, fast.ndim(op.inputs[0])) if np.any(op.zero) else None
    register = fast.accumulator if fast.accumulator is not None and fast.accumulator.bits < 64 else None

    def step(x: Tensor) -> Tensor:
        x = x.to(dtype)
        x = x if zero is None else x - zero
        inside = bias if joined and register is None else None
        if isinstance(op, Linear):
            y = F.linear(x, weight, inside)
        else:
            y = F.conv2d(x, weight, inside, op.stride, op.padding, op.dilation, op.groups)
        if inside is not None:
            return y
        if register is not None:
            y, lost = limit(y.long(), register.bits, register.overflow)
            register.overflows[op.layer] = register.overflows.get(op.layer, 0) + lost
        return torch.add(spread, y.to(after), alpha=2**op.align)

    return step


def _own_unit(fast: Fast, op: Conv | Linear) -> Callable[..., Tensor]:
    """A layer of another unit: the unit itself, on NumPy integers."""
    reference = Reference(fast.program, fast.accumulator)
    return lambda x: torch.from_numpy(reference.weighted(op, x.cpu().long().numpy())).to(fast.device)


def _requantize(fast: Fast, op: Requantize) -> Callable[..., Tensor]:
    ndim = fast.ndim(op.inputs[0])
    source = fast.program.tensors[op.inputs[0]]
    reach = max(abs(source.low), abs(source.high)) + int(np.abs(op.zero).max())
    most = reach * int(np.abs(op.multiplier).max()) + int(np.abs(op.addend).max())
    small = op.low >= -(2**23) and op.high < 2**23
    if most < _DOUBLE and op.rounding in ("half_even", "floor", "trunc"):
        factor = fast.constant(np.ldexp(op.multiplier.astype(np.float64), -op.shift), torch.float64, ndim)
        summand = op.addend - op.zero * op.multiplier
        summand = fast.constant(np.ldexp(summand.astype(np.float64), -op.shift), torch.float64, ndim)
        rounded = {"half_even": torch.Tensor.round_, "floor": torch.Tensor.floor_, "trunc": torch.Tensor.trunc_}[
            op.rounding
        ]
        plain = not bool(summand.any())

        def step(x: Tensor) -> Tensor:
            y = x.double().mul_(factor) if x.dtype is not torch.float64 else x * factor
            y = rounded(y if plain else y.add_(summand)).clamp_(op.low, op.high)
            return y.float() if small else y

        return step
    factor, addend, shift, zero = (
        fast.constant(v, torch.int64, ndim) for v in (op.multiplier, op.addend, op.shift, op.zero)
    )

    def whole(x: Tensor) -> Tensor:
        y = shift_round((x.long() - zero) * factor + addend, shift, op.rounding).clamp(op.low, op.high)
        return y.float() if small else y

    return whole


def _clamp(fast: Fast, op: Clamp) -> Callable[..., Tensor]:
    dtype = fast.exact(op.inputs[0])
    limits = [op.low, op.high]
    if all(v.size == 1 for v in limits):
        low, high = (int(v[0]) for v in limits)
        return lambda x: x.clamp(low, high)
    low, high = (fast.constant(v, dtype, fast.ndim(op.inputs[0])) for v in limits)
    return lambda x: x.clamp(low.to(x.dtype), high.to(x.dtype))


def _add(fast: Fast, op: Add) -> Callable[..., Tensor]:
    specs = [fast.program.tensors[n] for n in op.inputs]
    parts = [max(abs(s.low - int(z)), abs(s.high - int(z))) << int(k) for s, z, k in zip(specs, op.zeros, op.shifts)]
    dtype = fast.exact(op.output, most=sum(parts))
    terms = [(int(z), 2 ** int(k)) for z, k in zip(op.zeros, op.shifts)]

    def step(*xs: Tensor) -> Tensor:
        y = None
        for x, (zero, factor) in zip(xs, terms):
            x = x.to(dtype)
            x = x - zero if zero else x
            x = x * factor if factor != 1 else x
            y = x if y is None else y + x
        return y

    return step


def _sum_pool(fast: Fast, op: SumPool) -> Callable[..., Tensor]:
    dtype = fast.exact(*op.inputs, op.output)
    dtype = torch.float64 if dtype is torch.int64 else dtype
    zero = fast.constant(op.zero, dtype, fast.ndim(op.inputs[0])) if np.any(op.zero) else None

    def step(x: Tensor) -> Tensor:
        x = x.to(dtype)
        x = x if zero is None else x - zero
        return F.avg_pool2d(x, op.window, op.stride, op.padding, divisor_override=1)

    return step


def _max_pool(fast: Fast, op: MaxPool) -> Callable[..., Tensor]:
    def step(x: Tensor) -> Tensor:
        y = F.max_pool2d(
            x, op.window, op.stride, op.padding, op.dilation, ceil_mode=True
        )  # as many as asked for, or more
        return y[:, :, : op.size[0], : op.size[1]]

    return step


def _lookup(fast: Fast, op: Lookup) -> Callable[..., Tensor]:
    table = torch.from_numpy(np.array(op.table)).to(fast.device, fast.exact(op.output))
    return lambda x: table[x.long() - op.low]


def _strided_pad(fast: Fast, op: StridedPad) -> Callable[..., Tensor]:
    around = (0, 0, 0, 0, op.before, op.after)
    return lambda x: F.pad(x[:, :, :: op.stride, :: op.stride], around, value=int(op.zero[0]))


def _concat(fast: Fast, op: Concat) -> Callable[..., Tensor]:
    dtype = fast.exact(*op.inputs)
    return lambda *xs: torch.cat([x.to(dtype) for x in xs], 1)


_STEPS: dict[type[Op], Callable[[Fast, Op], Callable[..., Tensor]]] = {
    Conv: _weighted,
    Linear: _weighted,
    Requantize: _requantize,
    Clamp: _clamp,
    Add: _add,
    SumPool: _sum_pool,
    MaxPool: _max_pool,
    Lookup: _lookup,
    StridedPad: _strided_pad,
    Concat: _concat,
    Flatten: lambda fast, op: lambda x: x.flatten(1),
}
