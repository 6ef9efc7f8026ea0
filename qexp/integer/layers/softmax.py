"""Conversion of softmax: a table of exponentials, their sum, and a quotient."""

from __future__ import annotations

import numpy as np
from torch import nn

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import cannot
from qexp.integer.lowered import Computed
from qexp.integer.statistics import Softmax
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step

INPUT_BITS = 16
FRACTION = (
    22  # bits of the shares and of the exponentials: much finer than the grid of any reader, so that few ties arise
)


def softmax(walk: Walk, step: Step, name: str, layer: nn.Softmax, x: Value) -> Value:
    """Shares of exponentials along a dimension."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    axis = None if layer.dim is None else x.axis_of(layer.dim)
    if axis is None:
        raise cannot(name, f"dim={layer.dim} names no dimension of an image", "name the dimension, such as dim=-1")
    if not x.uniform or width(x.low, x.high) > INPUT_BITS:
        at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 8, symmetric: false}}}}"
        reason = f"a softmax needs an input of one scale and at most {INPUT_BITS} bits"
        raise cannot(name, reason, f"add deploy=integer, or a rule: '+quant.rules.softmax={at}'")
    distances = np.arange(x.high - x.low + 1)
    table = nearest(2.0**FRACTION * np.exp(-distances * float(x.unit[0]))).astype(np.int64)
    op = Softmax(
        layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), axis=axis, table=table, fraction=FRACTION
    )
    y = walk.writer.emit(op, Value(op.output, np.array([2.0**-FRACTION]), ZERO, 0, 2**FRACTION, x.shape))
    walk.lowered.computed[name] = Computed((x,), op, y)
    return walk.site(name, layer, "output", y)
