"""Conversion of vectors that are divided by their length: squares, root and quotient in whole numbers."""

from __future__ import annotations

import numpy as np

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import cannot
from qexp.integer.layers.moves import unified
from qexp.integer.layers.normalize import INPUT_BITS, WORD
from qexp.integer.lowered import Computed
from qexp.integer.statistics import UnitLength
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import operations
from qexp.network.graph import Step

FINER, FRACTION = (
    16,
    22,
)  # bits of the root and of the quotient behind the point: much finer than the grid of any reader


def unit_length(walk: Walk, step: Step, name: str, layer: operations.UnitLength, x: Value) -> Value:
    """Vectors along a dimension, divided by their length."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    axis = x.axis_of(layer.dim)
    if axis is None:
        raise cannot(name, f"dim={layer.dim} names no dimension of an image", "name the dimension, such as dim=-1")
    if not x.even or width(x.low, x.high) > INPUT_BITS:
        at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 16, symmetric: false}}}}"
        reason = f"a length needs an input of one scale and at most {INPUT_BITS} bits"
        raise cannot(name, reason, f"add deploy=integer, or a rule: '+quant.rules.length={at}'")
    if x.zero.size > 1:
        x = unified(walk, name, x)
    n, span = x.shape[axis], int(x.reach)
    if width(0, n * span**2) > WORD:
        raise cannot(name, f"the squares of {n} codes exceed 64 bits", "give its input 8 bits")
    finer = max(min(FINER, (WORD - width(0, n * span**2)) // 2), 0)
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
    walk.lowered.computed[name] = Computed(x, op, y)
    return walk.site(name, layer, "output", y)
