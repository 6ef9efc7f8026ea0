"""Conversion of lengths of vectors, and of vectors divided by their length: squares, root and quotient in whole numbers."""

from __future__ import annotations

import math

import numpy as np

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import cannot
from qexp.integer.layers.moves import reshaped, unified
from qexp.integer.layers.normalize import INPUT_BITS, WORD
from qexp.integer.lowered import Computed
from qexp.integer.statistics import Length, UnitLength
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import operations
from qexp.network.graph import Step

FINER, FRACTION = (
    16,
    22,
)  # bits of the root and of the quotient behind the point: much finer than the grid of any reader
ROOT_BITS = 8  # of a root that is the result, behind the point


def length(walk: Walk, step: Step, name: str, layer: operations.Length, x: Value) -> Value:
    """The root of the sum of squares over some dimensions."""
    x = _of_one_scale(walk, name, walk.integers(walk.site(name, layer, "input", x), name))
    axes = [x.axis_of(dim) for dim in layer.dims]
    if None in axes:
        raise cannot(name, f"dim={list(layer.dims)} names the batch", "name dimensions of an image, such as dim=-1")
    n = math.prod(x.shape[axis] for axis in axes)
    squares = _squares(name, n, x)
    finer = max(min(ROOT_BITS, (WORD - width(0, squares)) // 2), 0)
    op = Length(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        axes=tuple(sorted(axes)),
        zero=x.zero,
        finer=finer,
    )
    kept = tuple(1 if k in axes else size for k, size in enumerate(x.shape))
    high = math.isqrt(squares << 2 * finer)
    y = walk.writer.emit(op, Value(op.output, x.unit * 2.0**-finer, ZERO, 0, high, kept))
    if not layer.keepdim:
        y = reshaped(walk, name, y, tuple(size for k, size in enumerate(x.shape) if k not in axes))
    walk.lowered.computed[name] = Computed((x,), op, y)
    return walk.site(name, layer, "output", y)


def unit_length(walk: Walk, step: Step, name: str, layer: operations.UnitLength, x: Value) -> Value:
    """Vectors along a dimension, divided by their length."""
    x = _of_one_scale(walk, name, walk.integers(walk.site(name, layer, "input", x), name))
    axis = x.axis_of(layer.dim)
    if axis is None:
        raise cannot(name, f"dim={layer.dim} names no dimension of an image", "name the dimension, such as dim=-1")
    squares, span = _squares(name, x.shape[axis], x), int(x.reach)
    finer = max(min(FINER, (WORD - width(0, squares)) // 2), 0)
    fraction = min(FRACTION, WORD - 1 - width(0, span) - finer)
    least = max(int(nearest(layer.eps / float(x.unit[0]) * 2.0**finer)), 1)
    op = UnitLength(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        axis=axis,
        zero=x.zero,
        finer=finer,
        fraction=fraction,
        least=least,
    )
    one = 2**fraction  # no entry is greater than its vector's length
    y = walk.writer.emit(op, Value(op.output, np.array([2.0**-fraction]), ZERO, -one, one, x.shape))
    walk.lowered.computed[name] = Computed((x,), op, y)
    return walk.site(name, layer, "output", y)


def _of_one_scale(walk: Walk, name: str, x: Value) -> Value:
    if not x.even or width(x.low, x.high) > INPUT_BITS:
        at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 16, symmetric: false}}}}"
        reason = f"a length needs an input of one scale and at most {INPUT_BITS} bits"
        raise cannot(name, reason, f"add deploy=integer, or a rule: '+quant.rules.length={at}'")
    return unified(walk, name, x) if x.zero.size > 1 else x


def _squares(name: str, n: int, x: Value) -> int:
    """Returns the greatest sum of `n` squares."""
    most = n * int(x.reach) ** 2
    if width(0, most) > WORD:
        raise cannot(name, f"the squares of {n} codes exceed 64 bits", "give its input 8 bits")
    return most
