"""Clamps of codes and tables: ReLU, ReLU6, and every other function of one number."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qexp.errors import QexpError
from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import Grid, activation_grid, cannot
from qexp.integer.lowered import Site
from qexp.integer.program import Clamp, Lookup
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.layers.quantized import QUANTIZED, Quantized, float_class
from qexp.layers.swap import quantizers_off
from qexp.models.activations import Maxout, RPReLU
from qexp.network.graph import Step
from qexp.quantizers.base import Quantizer

TABLE_BITS = 16


def relu(
    walk: Walk,
    step: Step,
    name: str,
    layer: nn.Module | None,
    x: Value,
    top: float = math.inf,
    bottom: float = 0.0,
) -> Value:
    """A ReLU is a clamp of codes."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    y = _clamp(walk, name, x, bottom, top)
    return walk.site(name, layer, "output", y)


def relu6(walk: Walk, step: Step, name: str, layer: nn.Module | None, x: Value) -> Value:
    """A ReLU6 clamps at the code nearest to 6, too."""
    return relu(walk, step, name, layer, x, 6.0)


def hardtanh(walk: Walk, step: Step, name: str, layer: nn.Hardtanh, x: Value) -> Value:
    """A clamp at the codes nearest to its ends, either of which may be infinite."""
    return relu(walk, step, name, layer, x, layer.max_val, layer.min_val)


def _clamp(walk: Walk, name: str, x: Value, bottom: float, top: float) -> Value:
    low, high = _code(x, bottom, x.low), _code(x, top, x.high)
    if x.low >= int(low.max()) and x.high <= int(high.min()):
        return x
    least = max(x.low, int(low.min()))
    most = max(min(x.high, int(high.max())), least)
    op = Clamp(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), low=low, high=high, axis=x.axis)
    return walk.writer.emit(op, replace(x, tensor=op.output, low=least, high=most))


def _code(x: Value, real: float, infinite: int) -> NDArray[np.int64]:
    """Returns the codes nearest to a real number, one or one per channel; `infinite` where the number is."""
    if math.isinf(real):
        return np.full(1, infinite)
    return x.zero + nearest(real / x.unit).clip(-(2.0**52), 2.0**52).astype(np.int64)


def table(walk: Walk, step: Step, name: str, layer: nn.Module, x: Value) -> Value:
    """Any other function of one number: a table with one entry for each code of its input, rounded half up to the result's grid."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if width(x.low, x.high) > TABLE_BITS:
        raise _too_wide(name, layer, x)
    slopes = isinstance(layer, RPReLU | Maxout) or (isinstance(layer, nn.PReLU) and layer.weight.numel() > 1)
    channels = x.shape[x.axis] if slopes or not x.uniform else 1
    axis = x.axis if not x.uniform else 0
    if slopes and axis:
        raise cannot(name, "its channels come last and have slopes of their own", "use nn.PReLU() with one slope")
    codes = np.arange(x.low, x.high + 1)[:, None]
    real = np.broadcast_to((codes - x.zero) * x.unit, (len(codes), channels))
    values = _applied(layer, real).T  # [C, codes]
    if not np.isfinite(values).all():
        at = real[~np.isfinite(values).all(0)][0, 0]
        raise cannot(
            name, f"it is not finite at {at:g}, which its input may be", "clamp its input before: x.clamp(low, high)"
        )
    quantizer = layer.site("output") if isinstance(layer, Quantized) else None
    quantized = isinstance(quantizer, Quantizer)
    grid = activation_grid(quantizer, f"{name}.output") if quantized else _fine(values)
    if grid.scale.size > 1 and axis:
        raise cannot(
            f"{name}.output", "its channels come last and have different scales", "use granularity: tensor there"
        )
    scale, zero = (np.reshape(v, (-1, 1)) for v in (grid.scale, grid.zero))
    entries = (nearest(values / scale).astype(np.int64) + zero).clip(grid.low, grid.high)
    low, high = int(entries.min()), int(entries.max())
    entries = entries[0] if (entries == entries[0]).all() else entries
    op = Lookup(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), table=entries, low=x.low, axis=axis)
    y = walk.writer.emit(op, Value(op.output, grid.scale, grid.zero, low, high, x.shape))
    walk.lowered.sites[name, "output" if quantized else "output (wide)"] = Site(y.tensor, y, None, y, quantized)
    return y


def _too_wide(name: str, layer: nn.Module, x: Value) -> QexpError:
    bits = width(x.low, x.high)
    reason = f"a table needs an input of at most {TABLE_BITS} bits, this one has {bits}"
    at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 8, symmetric: false}}}}"
    if float_class(layer) in QUANTIZED:
        return cannot(name, reason, f"add deploy=integer, or give its input 8 bits: '+quant.rules.table={at}'")
    return cannot(name, reason, "quantize the output of the layer before it (quant.output), or write a ReLU")


def _applied(layer: nn.Module, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns a layer's results for numbers `[numbers, channels]`, computed in float64 as the simulation does."""
    with quantizers_off(layer), torch.no_grad():
        exact = copy.deepcopy(layer).double()
        for name, held in vars(exact).items():  # slopes that belong to the module which calls F.prelu
            if isinstance(held, torch.Tensor):
                vars(exact)[name] = held.double()
        made = exact(torch.from_numpy(values.copy())[:, :, None, None])
    return made[:, :, 0, 0].numpy()


def _fine(values: NDArray[np.float64]) -> Grid:
    """Returns 16 bits for results that are float in the simulation."""
    unit = 2.0 ** (np.ceil(np.log2(max(float(np.abs(values).max()), 1e-30))) - 15)
    return Grid(np.array([unit]), ZERO, -(2**15), 2**15, "half_up")
