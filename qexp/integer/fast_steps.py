"""The function of a fast executor for each operation, with constants prepared in advance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from qexp_kernels import rescale
from torch import Tensor

from qexp.integer import int8
from qexp.integer.arithmetic import FLOAT32_SUM, RUNTIMES, limit, requantized
from qexp.integer.bounds import partial_sums
from qexp.integer.fast_moves import MOVES
from qexp.integer.fast_products import PRODUCTS
from qexp.integer.fast_statistics import STATISTICS
from qexp.integer.lines import mapped
from qexp.integer.machine import Machine
from qexp.integer.op import Op
from qexp.integer.program import Add, Clamp, Conv, Linear, Lookup, MaxPool, Requantize, SumPool
from qexp.integer.reference import Reference


def _weighted(fast: Machine, op: Conv | Linear) -> Callable[..., Tensor]:
    if op.unit:
        return _own_unit(fast, op)
    products = sums(fast, op)
    if products is None:  # beyond 53 bits: computes as the reference does
        return lambda x: torch.from_numpy(Reference(fast.program).weighted(op, x.cpu().long().numpy())).to(fast.device)
    source = fast.program.tensors[op.inputs[0]]
    low, high = partial_sums(op, source.low, source.high)
    after = fast.exact(op.output, most=max(-low, high) << op.align)
    spread = fast.constant(op.bias, after, fast.ndim(op.output), _axis(fast, op))
    register = fast.accumulator if fast.accumulator is not None and fast.accumulator.bits < 64 else None

    def step(x: Tensor) -> Tensor:
        y = products(fast.kept(op.inputs[0], x))
        if register is not None:
            y, lost = limit(y.long(), register.bits, register.overflow)
            register.overflows[op.layer] = register.overflows.get(op.layer, 0) + lost
        return torch.add(spread, y.to(after), alpha=2**op.align)

    return step


def sums(fast: Machine, op: Conv | Linear) -> Callable[[Tensor], Tensor] | None:
    """Returns a function from a layer's input, as it is kept, to its exact sums of products; None if no floating type holds them."""
    source = fast.program.tensors[op.inputs[0]]
    if fast.in_bytes(op):
        return int8.sums(op, source.low, source.high)
    low, high = partial_sums(op, source.low, source.high)
    widest = max(abs(source.low - int(op.zero.max())), abs(source.high - int(op.zero.min())))
    dtype = fast.exact(most=max(widest, int(np.abs(op.weight).max(initial=0)), -low, high))
    if dtype is torch.int64:
        return None
    weight = torch.from_numpy(op.weight).to(fast.device, dtype)
    moved = op.zero + fast.stored(op.inputs[0]).offset
    zero = fast.constant(moved, dtype, fast.ndim(op.inputs[0]), _axis(fast, op)) if np.any(moved) else None

    def step(x: Tensor) -> Tensor:
        x = x.to(dtype)
        x = x if zero is None else x - zero
        if isinstance(op, Linear):
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, op.stride, op.padding, op.dilation, op.groups)

    return step


def _axis(fast: Machine, op: Conv | Linear) -> int:
    """Returns the dimension of a layer's channels, the batch not counted: the last one of linear layers."""
    return fast.ndim(op.output) - 2 if isinstance(op, Linear) else 0


def _rescaled(x: Tensor, factor: Tensor, summand: Tensor, low, high, rounding: str, dtype, axis: int) -> Tensor:
    """Returns `rescale` of a tensor whose channels lie along `axis`, the batch not counted."""
    if axis and max(factor.numel(), summand.numel()) > 1:
        x = x.movedim(axis + 1, 1)
        return rescale(x, factor, summand, low, high, rounding=rounding, dtype=dtype).movedim(1, axis + 1)
    return rescale(x, factor, summand, low, high, rounding=rounding, dtype=dtype)


def _own_unit(fast: Machine, op: Conv | Linear) -> Callable[..., Tensor]:
    """A layer with a special unit runs the unit itself, on NumPy integers."""
    reference = Reference(fast.program, fast.accumulator)
    return lambda x: torch.from_numpy(reference.weighted(op, x.cpu().long().numpy())).to(fast.device)


def _requantize(fast: Machine, op: Requantize) -> Callable[..., Tensor]:
    if op.rounding in RUNTIMES:
        return _as_runtimes(fast, op)
    source = fast.program.tensors[op.inputs[0]]
    line = mapped(op, max(abs(source.low), abs(source.high)))
    dtype = fast.exact(op.output)
    if line is not None and dtype is not torch.int64:
        factor, summand = (torch.from_numpy(np.array(v)).to(fast.device) for v in line)

        def step(x: Tensor) -> Tensor:
            x = x if x.dtype in (torch.float32, torch.float64) else x.double()
            return _rescaled(x, factor, summand, op.low, op.high, op.rounding, dtype, op.axis)

        return step
    ndim, small = fast.ndim(op.inputs[0]), op.low >= -(2**23) and op.high < 2**23
    factor, addend, shift, zero = (
        fast.constant(v, torch.int64, ndim, op.axis) for v in (op.multiplier, op.addend, op.shift, op.zero)
    )

    def whole(x: Tensor) -> Tensor:
        y = requantized(x.long() - zero, factor, addend, shift, op.rounding).clamp(op.low, op.high)
        return y.float() if small else y

    return whole


def _as_runtimes(fast: Machine, op: Requantize) -> Callable[..., Tensor]:
    """A requantization in float32 is one pass, except for its zero point."""
    ndim, dtype = fast.ndim(op.inputs[0]), fast.exact(op.output)
    factor = fast.constant(np.ldexp(op.multiplier.astype(np.float64), -op.shift), torch.float32, ndim, op.axis)
    after = fast.constant(op.addend >> op.shift, torch.float32, ndim, op.axis)
    zero = fast.constant(op.zero, torch.float64, ndim, op.axis) if np.any(op.zero) else None

    def step(x: Tensor) -> Tensor:
        x = x if zero is None else x.double() - zero
        if op.rounding == FLOAT32_SUM:
            return torch.round((x.float() * factor).add_(after)).clamp_(op.low, op.high).to(dtype)
        return torch.round(x.float() * factor).add_(after).clamp_(op.low, op.high).to(dtype)

    return step


def _clamp(fast: Machine, op: Clamp) -> Callable[..., Tensor]:
    dtype = fast.exact(op.inputs[0])
    limits = [op.low, op.high]
    if all(v.size == 1 for v in limits):
        low, high = (int(v[0]) for v in limits)
        return lambda x: x.clamp(low, high)
    low, high = (fast.constant(v, dtype, fast.ndim(op.inputs[0]), op.axis) for v in limits)
    return lambda x: x.clamp(low.to(x.dtype), high.to(x.dtype))


def _add(fast: Machine, op: Add) -> Callable[..., Tensor]:
    specs = [fast.program.tensors[n] for n in op.inputs]
    parts = [max(abs(s.low - int(z)), abs(s.high - int(z))) << int(k) for s, z, k in zip(specs, op.zeros, op.shifts)]
    dtype = fast.exact(op.output, most=sum(parts))
    terms = [(int(z), 2 ** int(k)) for z, k in zip(op.zeros, op.shifts)]

    def step(*xs: Tensor) -> Tensor:
        y = None
        for x, (zero, factor) in zip(xs, terms):
            x = x.to(dtype)
            x = x - zero if zero else x
            y = (x * factor if factor != 1 else x.clone()) if y is None else y.add_(x, alpha=factor)
        return y

    return step


def _sum_pool(fast: Machine, op: SumPool) -> Callable[..., Tensor]:
    dtype = fast.exact(*op.inputs, op.output)
    dtype = torch.float64 if dtype is torch.int64 else dtype
    zero = fast.constant(op.zero, dtype, fast.ndim(op.inputs[0])) if np.any(op.zero) else None

    def step(x: Tensor) -> Tensor:
        x = x.to(dtype)
        x = x if zero is None else x - zero
        return F.avg_pool2d(x, op.window, op.stride, op.padding, divisor_override=1)

    return step


def _max_pool(fast: Machine, op: MaxPool) -> Callable[..., Tensor]:
    def step(x: Tensor) -> Tensor:
        if x.dtype is torch.uint8:
            return _greatest(_greatest(x, op, 2), op, 3)
        # At least the requested number.
        y = F.max_pool2d(x, op.window, op.stride, op.padding, op.dilation, ceil_mode=True)
        return y[:, :, : op.size[0], : op.size[1]]

    return step


def _greatest(x: Tensor, op: MaxPool, axis: int) -> Tensor:
    """Returns the greatest bytes of windows along one axis; beyond the border lies zero, the least byte."""
    size, window, stride, padding, dilation = (
        v[axis - 2] for v in (op.size, op.window, op.stride, op.padding, op.dilation)
    )
    need = (size - 1) * stride + dilation * (window - 1) + 1
    around = [padding, max(need - x.shape[axis] - padding, 0)]
    x = F.pad(x, [0, 0, *around] if axis == 2 else around)
    y = None
    for first in range(0, dilation * window, dilation):
        part = x.narrow(axis, first, (size - 1) * stride + 1)
        part = part[:, :, ::stride] if axis == 2 else part[..., ::stride]
        y = part if y is None else torch.maximum(y, part)
    return y


def _lookup(fast: Machine, op: Lookup) -> Callable[..., Tensor]:
    table = torch.from_numpy(np.array(op.table)).to(fast.device, fast.exact(op.output))
    if table.ndim == 1:
        return lambda x: table[x.long() - op.low]
    row = fast.constant(np.arange(len(table)), torch.int64, fast.ndim(op.output), op.axis)
    return lambda x: table[row, x.long() - op.low]


STEPS: dict[type[Op], Callable[[Machine, Op], Callable[..., Tensor]]] = {
    Conv: _weighted,
    Linear: _weighted,
    Requantize: _requantize,
    Clamp: _clamp,
    Add: _add,
    SumPool: _sum_pool,
    MaxPool: _max_pool,
    Lookup: _lookup,
    **PRODUCTS,
    **MOVES,
    **STATISTICS,
}
