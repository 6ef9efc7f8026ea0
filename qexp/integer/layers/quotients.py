"""Conversion of quotients of two tensors."""

from __future__ import annotations

import numpy as np
from torch import nn

from qexp.integer.arithmetic import width
from qexp.integer.grids import cannot
from qexp.integer.layers.joins import operands
from qexp.integer.layers.normalize import INPUT_BITS
from qexp.integer.lowered import Computed
from qexp.integer.products import Divide
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step

FRACTION = 18  # bits of the quotient of two codes behind the point


def divide(walk: Walk, step: Step, name: str, layer: nn.Module | None, a: Value, b: Value) -> Value:
    """A quotient of two tensors, number by number; sizes of 1 of the divisor are repeated."""
    a, b = operands(walk, name, layer, (a, b))
    if len(a.shape) != len(b.shape) or any(m not in (1, n) for n, m in zip(a.shape, b.shape)):
        raise cannot(
            name, f"it divides {list(a.shape)} by {list(b.shape)}", "divide by a tensor of that shape, or of sizes 1"
        )
    if any(not x.uniform or width(x.low, x.high) > INPUT_BITS for x in (a, b)):
        at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 16, symmetric: false}}}}"
        reason = f"a quotient needs operands of one scale and at most {INPUT_BITS} bits"
        raise cannot(name, reason, f"add deploy=integer, or a rule: '+quant.rules.quotient={at}'")
    zeros = np.array([int(x.zero[0]) for x in (a, b)])
    op = Divide(layer=name, inputs=(a.tensor, b.tensor), output=walk.writer.fresh(name), zeros=zeros, fraction=FRACTION)
    most = a.reach << FRACTION  # over the least divisor
    y = walk.writer.emit(op, Value(op.output, a.unit / b.unit * 2.0**-FRACTION, ZERO, -most, most, a.shape))
    walk.lowered.computed[name] = Computed((a, b), op, y)
    return walk.site(name, layer, "output", y)
