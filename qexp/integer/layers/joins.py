"""Conversion of operations that combine tensors: sums, products, concatenations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from qexp.integer.arithmetic import FLOAT32_SUM, width
from qexp.integer.grids import Grid, cannot
from qexp.integer.layers.affine import multiple
from qexp.integer.layers.moves import padded, permuted, reshaped, unified
from qexp.integer.lowered import Site
from qexp.integer.moves import Concat
from qexp.integer.products import MatMul, Multiply
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import modules, operations
from qexp.network.graph import Step

FACTOR_BITS = 22  # of the operands of a product that are wider in the simulation: their product leaves room for its requantization


def add(walk: Walk, step: Step, name: str, layer: nn.Module | None, *xs: Value) -> Value:
    """A residual add: operands are brought to power-of-two steps, unless they are on one grid."""
    xs = operands(walk, name, layer, xs)
    if len({x.shape for x in xs}) > 1:
        raise cannot(
            name, f"it adds tensors of different shapes {[list(x.shape) for x in xs]}", "add tensors of one shape"
        )
    xs = walk.settle(list(xs), name, [f"input.{i}" for i in range(len(xs))])
    return walk.site(name, layer, "output", walk.writer.add(xs, name))


def subtract(walk: Walk, step: Step, name: str, layer: nn.Module | None, a: Value, b: Value) -> Value:
    """A difference: the sum with the opposite."""
    xs = walk.settle(operands(walk, name, layer, (a, b)), name, ["input.0", "input.1"])
    opposite = multiple(walk, name, xs[1], np.full((1,) * len(b.shape), -1.0), np.zeros((1,) * len(b.shape)))
    return walk.site(name, layer, "output", walk.writer.add([xs[0], opposite], name))


def multiply(walk: Walk, step: Step, name: str, layer: nn.Module | None, a: Value, b: Value) -> Value:
    """A product of two tensors, a gate and a map say: codes times codes; sizes of 1 are repeated."""
    a, b = factors(walk, name, operands(walk, name, layer, (a, b)))
    if len(a.shape) != len(b.shape):
        raise cannot(
            name, f"it multiplies tensors of {len(a.shape)} and {len(b.shape)} dimensions", "give both the same"
        )
    shape = tuple(np.broadcast_shapes(a.shape, b.shape))
    a, b = (_repeatable(walk, name, x, other) for x, other in ((a, b), (b, a)))
    axis = next((x.axis for x in (a, b) if not x.uniform or x.unit.size > 1), 0)
    op = Multiply(
        layer=name, inputs=(a.tensor, b.tensor), output=walk.writer.fresh(name), zeros=_zeros(walk, name, a, b)
    )
    low, high = _product_range(op.zeros, a, b)
    sums = np.float32(a.unit) * np.float32(b.unit) if a.even and b.even else None
    y = walk.writer.emit(op, Value(op.output, a.unit * b.unit, ZERO, low, high, shape, None, sums, axis, FLOAT32_SUM))
    return walk.site(name, layer, "output", y)


def matmul(walk: Walk, step: Step, name: str, layer: nn.Module | None, a: Value, b: Value) -> Value:
    """A product of two matrices of activations."""
    a, b = (unified(walk, name, x) for x in factors(walk, name, operands(walk, name, layer, (a, b))))
    if a.batch >= a.ndim - 2 or b.batch >= b.ndim - 2:
        raise cannot(
            name, "its matrices hold images of a batch", "move the images to dimension 0 before: x.permute(...)"
        )
    turned = getattr(layer, "turned", (False, False))
    a, b = (_turned(walk, name, x) if t else x for x, t in zip((a, b), turned))
    if len(a.shape) != len(b.shape) or a.shape[:-2] != b.shape[:-2]:
        raise cannot(
            name, f"it multiplies matrices {list(a.shape)} and {list(b.shape)}", "give both the same dimensions"
        )
    op = MatMul(layer=name, inputs=(a.tensor, b.tensor), output=walk.writer.fresh(name), zeros=_zeros(walk, name, a, b))
    low, high = (end * a.shape[-1] for end in _product_range(op.zeros, a, b))
    sums = np.float32(a.unit) * np.float32(b.unit)
    shape = (*a.shape[:-1], b.shape[-1])
    y = walk.writer.emit(op, Value(op.output, a.unit * b.unit, ZERO, low, high, shape, None, sums))
    return walk.site(name, layer, "output", y)


def _turned(walk: Walk, name: str, x: Value) -> Value:
    """Returns a value with its last two dimensions exchanged."""
    last = len(x.shape) - 1
    return permuted(walk, name, x, (*range(last - 1), last, last - 1))


def operands(walk: Walk, name: str, layer: nn.Module | None, xs: tuple[Value, ...]) -> list[Value]:
    """Returns the operands of a join after their own quantizers."""
    return [walk.integers(walk.site(name, layer, f"input.{i}", x), name) for i, x in enumerate(xs)]


def factors(walk: Walk, name: str, xs: list[Value]) -> list[Value]:
    """Returns the operands of a product; those that are float in the simulation get steps that leave room for the product.

    The simulation rounds each of them, and not the product: a batch norm before may leave fractions.
    """
    wide = sum(width(x.low, x.high) for x in xs) > 2 * FACTOR_BITS
    found = []
    for i, x in enumerate(xs):
        if wide and width(x.low, x.high) > FACTOR_BITS:
            x = narrowed(walk, name, x, f"input.{i}")
        elif (name, f"input.{i}") not in walk.lowered.sites and walk.rounds(name):
            walk.lowered.sites[name, f"input.{i} (wide)"] = Site(x.tensor, x, None, x, quantized=False)
        found.append(x)
    return found


def narrowed(walk: Walk, name: str, x: Value, site: str, bits: int = FACTOR_BITS) -> Value:
    """Returns a value that is float in the simulation on the finest power-of-two step at which it fits into `bits`."""
    unit = 2.0 ** (np.ceil(np.log2(max(float(np.max(x.span)), 1e-30))) - (bits - 1))
    grid = Grid(np.array([unit]), np.zeros(1, np.int64), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, "half_even")
    y, op = walk.writer.requantize(x, grid, name, f"{name}.{site}")
    walk.lowered.sites[name, f"{site} (wide)"] = Site(y.tensor, x, op, y, quantized=False)
    return y


def _repeatable(walk: Walk, name: str, x: Value, other: Value) -> Value:
    """Returns an operand whose units are one number, or lie along the same dimension as those of the other operand."""
    same = other.uniform or x.axis == other.axis
    return x if x.uniform or (same and x.zero.size == 1) else unified(walk, name, x)


def _zeros(walk: Walk, name: str, *xs: Value) -> np.ndarray:
    return np.array([int(x.zero[0]) for x in xs])


def _product_range(zeros: np.ndarray, a: Value, b: Value) -> tuple[int, int]:
    corners = [(x - int(zeros[0])) * (y - int(zeros[1])) for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(corners), max(corners)


def concat(walk: Walk, step: Step, name: str, layer: modules.Concat, *xs: Value) -> Value:
    """A concatenation along the dimension that the layer names."""
    if any(x.real is not None for x in xs):
        return walk.site(name, layer, "output", _with_constants(walk, name, list(xs), layer.dim))
    y = joined(walk, name, [walk.integers(x, name) for x in xs], layer.dim)
    return walk.site(name, layer, "output", y)


def stack(walk: Walk, step: Step, name: str, layer: operations.Stack, *xs: Value) -> Value:
    """Tensors side by side along a new dimension."""
    dim = layer.dim % (xs[0].ndim + 1)
    if not dim:
        raise cannot(name, "it puts more images into the batch", "stack along another dimension")
    xs = [walk.integers(x, name) for x in xs]
    xs = walk.settle(xs, name, [f"input.{i}" for i in range(len(xs))]) if len(set(map(_grid, xs))) > 1 else xs
    parts = [reshaped(walk, name, x, (*x.shape[: dim - 1], 1, *x.shape[dim - 1 :])) for x in xs]
    return joined(walk, name, parts, dim)


def _grid(x: Value) -> tuple[bytes, bytes]:
    return x.unit.tobytes(), x.zero.tobytes()


def _with_constants(walk: Walk, name: str, xs: list[Value], dim: int) -> Value:
    """Returns one tensor between constants (the token of a class, say): it is padded with zeros, to which they are added."""
    moving = [k for k, x in enumerate(xs) if x.real is None]
    if len(moving) != 1:
        raise cannot(name, "it joins several tensors with constants", "concatenate the tensors first")
    x = walk.integers(xs[moving[0]], name)
    axis = x.axis_of(dim)
    if axis is None or x.batch or x.lead:
        raise cannot(name, "it joins constants to tensors whose images are not in dimension 0", "do so before it")
    parts = [np.zeros(x.shape) if other.real is None else other.real[0] for other in xs]
    sizes = [part.shape[axis] for part in parts]
    before, after = ([0] * len(x.shape) for _ in range(2))
    before[axis], after[axis] = sum(sizes[: moving[0]]), sum(sizes[moving[0] + 1 :])
    y = padded(walk, name, x, before, after)
    return multiple(walk, name, y, np.ones((1,) * len(x.shape)), np.concatenate(parts, axis))


def joined(walk: Walk, name: str, xs: list[Value], dim: int) -> Value:
    """Returns operands side by side; along the channels, each keeps its step and its zero point until the next quantizer."""
    axis = xs[0].axis_of(dim)
    if axis is None:
        raise cannot(name, "it puts more images into the batch", "concatenate another dimension")
    apart = set(map(_grid, xs))
    if len(apart) > 1 and (axis or any(x.axis != axis for x in xs if not x.uniform)):
        xs = walk.settle(xs, name, [f"input.{i}" for i in range(len(xs))])
        xs = _one_step(walk, name, xs)
    shape = (*xs[0].shape[:axis], sum(x.shape[axis] for x in xs), *xs[0].shape[axis + 1 :])
    op = Concat(layer=name, inputs=tuple(x.tensor for x in xs), output=walk.writer.fresh(name), axis=axis)
    low, high = min(x.low for x in xs), max(x.high for x in xs)
    if len(set(map(_grid, xs))) == 1 and (xs[0].uniform or xs[0].axis != axis):
        first = replace(xs[0], tensor=op.output, shape=shape, low=low, high=high, most=None, sums=None)
        return walk.writer.emit(op, first)
    parts = {k: _side_by_side(xs, [getattr(x, k) for x in xs]) for k in ("unit", "zero", "span")}
    parts["sums"] = _side_by_side(xs, [np.float32(x.unit) if x.held is None else x.held for x in xs])
    unit, zero = (v[:1] if (v == v[0]).all() else v for v in (parts["unit"], parts["zero"]))
    value = Value(op.output, unit, zero, low, high, shape, parts["span"], parts["sums"])
    return walk.writer.emit(op, value)


def _one_step(walk: Walk, name: str, xs: list[Value]) -> list[Value]:
    """Returns values on power-of-two steps with the finest of these steps."""
    finest = min(float(x.unit[0]) for x in xs)
    return [walk.writer.add([x], name, finest) if float(x.unit[0]) != finest or x.zero.any() else x for x in xs]


def _side_by_side(xs: list[Value], parts: list[np.ndarray | None]) -> np.ndarray | None:
    """Returns one number per channel of all operands, None where one of them has none."""
    if any(part is None for part in parts):
        return None
    return np.concatenate([np.broadcast_to(part, (x.shape[0],)) for x, part in zip(xs, parts)])


def passed(walk: Walk, step: Step, name: str, layer: nn.Module, x: Value) -> Value:
    """An operation that does nothing in evaluation mode."""
    return x
