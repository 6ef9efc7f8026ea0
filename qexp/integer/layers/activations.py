"""Clamps of codes and tables: ReLU, ReLU6, and every other function of one number."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import Grid, activation_grid, cannot
from qexp.integer.lowered import Site
from qexp.integer.program import Clamp, Lookup
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.layers.quantized import QUANTIZED, Quantized
from qexp.layers.swap import quantizers_off
from qexp.network.graph import Step
from qexp.quantizers.base import Quantizer

TABLE_BITS = 16


def relu(walk: Walk, step: Step, name: str, layer: nn.Module | None, x: Value, top: float = math.inf) -> Value:
    """A ReLU is a clamp of codes."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    y = _clamp(walk, name, x, top)
    return walk.site(name, layer, "output", y)


def relu6(walk: Walk, step: Step, name: str, layer: nn.Module | None, x: Value) -> Value:
    """A ReLU6 clamps at the code nearest to 6, too."""
    return relu(walk, step, name, layer, x, 6.0)


def _clamp(walk: Walk, name: str, x: Value, top: float) -> Value:
    low = x.zero
    high = (
        np.full(1, x.high) if math.isinf(top) else x.zero + np.minimum(nearest(top / x.unit), 2.0**52).astype(np.int64)
    )
    least, most = int(low.min()), min(x.high, int(high.max()))
    if x.low >= int(low.max()) and x.high <= int(high.min()):
        return x
    least, most = max(x.low, least), max(most, least)
    op = Clamp(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), low=low, high=high)
    return walk.writer.emit(op, replace(x, tensor=op.output, low=least, high=most))


def table(walk: Walk, step: Step, name: str, layer: nn.Module, x: Value) -> Value:
    """Any other activation: a table with one entry for each code of its input, rounded half up to the result's grid."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if not x.even or x.zero.size > 1 or width(x.low, x.high) > TABLE_BITS:
        reason = (
            f"a table needs an input of one scale and at most {TABLE_BITS} bits, this one has {width(x.low, x.high)}"
        )
        at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 8, symmetric: false}}}}"
        rule = "give its input 8 bits and one scale"
        if isinstance(layer, tuple(k for k in QUANTIZED if not isinstance(layer, nn.Conv2d | nn.Linear))):
            raise cannot(name, reason, f"{rule}: '+quant.rules.table={at}'")
        raise cannot(
            name, reason, f"{rule}: quantize the output of the layer before it (quant.output), or write a ReLU"
        )
    if sum(p.numel() for p in layer.parameters(recurse=False)) > 1:
        raise cannot(name, "its channels have different slopes", "use nn.PReLU() with one slope")
    codes = np.arange(x.low, x.high + 1)
    with quantizers_off(layer):
        values = copy.deepcopy(layer).double()(torch.from_numpy((codes - x.zero) * x.unit)).detach().numpy()
    quantizer = layer.site("output") if isinstance(layer, Quantized) else None
    if isinstance(quantizer, Quantizer):
        grid = activation_grid(quantizer, f"{name}.output")
    else:
        unit = 2.0 ** (np.ceil(np.log2(max(float(np.abs(values).max()), 1e-30))) - 15)
        grid = Grid(np.array([unit]), ZERO, -(2**15), 2**15, "half_up")
    if grid.scale.size > 1:
        raise cannot(f"{name}.output", "its channels have different scales", "use granularity: tensor there")
    entries = (nearest(values / grid.scale).astype(np.int64) + grid.zero).clip(grid.low, grid.high)
    low, high = int(entries.min()), int(entries.max())
    op = Lookup(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), table=entries, low=x.low)
    y = walk.writer.emit(op, Value(op.output, grid.scale, grid.zero, low, high, x.shape))
    quantized = isinstance(quantizer, Quantizer)
    walk.lowered.sites[name, "output" if quantized else "output (wide)"] = Site(y.tensor, y, None, y, quantized)
    return y
