"""Pools: the greatest code of a window, or the sum of its codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from qexp.integer.grids import cannot
from qexp.integer.layers.shapes import pair, windows
from qexp.integer.lowered import Site
from qexp.integer.program import MaxPool, SumPool
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step


def max_pool(walk: Walk, step: Step, name: str, layer: nn.MaxPool2d, x: Value) -> Value:
    """The greatest code is the code of the greatest value."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    window, padding, dilation = pair(layer.kernel_size), pair(layer.padding), pair(layer.dilation)
    stride = pair(layer.stride)
    size = windows(x.shape, window, stride, padding, dilation, layer.ceil_mode)
    op = MaxPool(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        window=window,
        stride=stride,
        padding=padding,
        dilation=dilation,
        size=size,
    )
    y = walk.writer.emit(op, replace(x, tensor=op.output, shape=(x.shape[0], *size)))
    return walk.site(name, layer, "output", y)


def average_pool(walk: Walk, step: Step, name: str, layer: nn.AvgPool2d, x: Value) -> Value:
    """An average is a sum whose unit is smaller."""
    if layer.ceil_mode or layer.divisor_override or (any(pair(layer.padding)) and not layer.count_include_pad):
        raise cannot(
            name, "its windows count different numbers of pixels", "use ceil_mode=False and count_include_pad=True"
        )
    return _sum_pool(walk, name, layer, x, pair(layer.kernel_size), pair(layer.stride), pair(layer.padding))


def adaptive_pool(walk: Walk, step: Step, name: str, layer: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    """An average over windows of one size."""
    want = [w if w is not None else n for w, n in zip(pair(layer.output_size), x.shape[1:])]
    if any(n % w for n, w in zip(x.shape[1:], want)):
        raise cannot(name, f"{list(x.shape[1:])} is no multiple of its output {want}", "choose another image size")
    window = tuple(n // w for n, w in zip(x.shape[1:], want))
    return _sum_pool(walk, name, layer, x, window, window, (0, 0))


def _sum_pool(walk: Walk, name: str, layer: nn.Module, x: Value, window, stride, padding) -> Value:
    x = walk.integers(walk.site(name, layer, "input", x), name)
    # Rounds each summand and not the sum: a batch norm before may leave fractions.
    if (name, "input") not in walk.lowered.sites:
        walk.lowered.sites[name, "input.0 (wide)"] = Site(x.tensor, x, None, x, quantized=False)
    count = window[0] * window[1]
    low, high = min((x.low - int(x.zero.max())) * count, 0), max((x.high - int(x.zero.min())) * count, 0)
    op = SumPool(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        window=window,
        stride=stride,
        padding=padding,
        zero=x.zero,
    )
    shape = (x.shape[0], *windows(x.shape, window, stride, padding))
    sums = np.float32(x.unit) * np.float32(1 / count) if x.even else None
    y = walk.writer.emit(op, Value(op.output, x.unit / count, ZERO, low, high, shape, x.most, sums))
    return walk.site(name, layer, "output", y)
