"""Conversion of operations that move codes or combine tensors: adds, concatenations, shortcuts, flattening."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import nn

from qexp.integer.grids import cannot
from qexp.integer.program import Concat, Flatten, StridedPad
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import modules
from qexp.network.graph import Step


def add(walk: Walk, step: Step, name: str, layer: nn.Module, *xs: Value) -> Value:
    """A residual add: operands are brought to power-of-two steps, unless they are on one grid."""
    xs = [walk.integers(walk.site(name, layer, f"input.{i}", x), name) for i, x in enumerate(xs)]
    xs = walk.settle(list(xs), name, [f"input.{i}" for i in range(len(xs))])
    return walk.site(name, layer, "output", walk.writer.add(xs, name))


def concat(walk: Walk, step: Step, name: str, layer: modules.Concat, *xs: Value) -> Value:
    """A concatenation: steps may differ from channel to channel until the next quantizer, zero points may not."""
    xs = [walk.integers(x, name) for x in xs]
    if layer.dim != 1 or any(int(np.abs(x.zero).max()) for x in xs):
        raise cannot(
            name, "its operands have zero points, or it is not along the channels", "use symmetric codes before it"
        )
    unit = np.concatenate([np.broadcast_to(x.unit, (x.shape[0],)) for x in xs])
    unit = unit[:1] if (unit == unit[0]).all() else unit
    shape = (sum(x.shape[0] for x in xs), *xs[0].shape[1:])
    op = Concat(layer=name, inputs=tuple(x.tensor for x in xs), output=walk.writer.fresh(name))
    most, sums = (_side_by_side(xs, [getattr(x, field) for x in xs]) for field in ("span", "sums"))
    low, high = min(x.low for x in xs), max(x.high for x in xs)
    y = walk.writer.emit(op, Value(op.output, unit, ZERO, low, high, shape, most, sums))
    return walk.site(name, layer, "output", y)


def _side_by_side(xs: list[Value], parts: list[np.ndarray | None]) -> np.ndarray | None:
    """Returns one number per channel of all operands, None where one of them has none."""
    if any(part is None for part in parts):
        return None
    return np.concatenate([np.broadcast_to(part, (x.shape[0],)) for x, part in zip(xs, parts)])


def strided_pad(walk: Walk, step: Step, name: str, layer: modules.StridedPad, x: Value) -> Value:
    """The parameter-free shortcut: new channels hold zero."""
    x = walk.integers(x, name)
    if x.unit.size > 1 or x.zero.size > 1:
        x = walk.settle([x], name, ["input"])[0]
    shape = (x.shape[0] + layer.before + layer.after, *(math.ceil(n / layer.stride) for n in x.shape[1:]))
    op = StridedPad(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        stride=layer.stride,
        before=layer.before,
        after=layer.after,
        zero=x.zero,
    )
    low, high = min(x.low, int(x.zero[0])), max(x.high, int(x.zero[0]))
    return walk.writer.emit(op, Value(op.output, x.unit, x.zero, low, high, shape))


def flatten(walk: Walk, step: Step, name: str, layer: nn.Module | None, x: Value) -> Value:
    """Flattens maps to features; one unit per channel becomes one per feature."""
    if len(x.shape) == 1:
        return x
    size = math.prod(x.shape)
    if not x.tensor:
        return replace(x, shape=(size,))
    per = size // x.shape[0]
    fields = {k: getattr(x, k) for k in ("unit", "zero", "most", "sums")}
    spread = {k: v if v is None or v.size == 1 else np.repeat(v, per) for k, v in fields.items()}
    op = Flatten(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name))
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=(size,), **spread))


def passed(walk: Walk, step: Step, name: str, layer: nn.Module, x: Value) -> Value:
    """An operation that does nothing in evaluation mode."""
    return x
