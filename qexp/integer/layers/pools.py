"""Pools: the greatest code of a window, or the sum of its codes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import nn

from qexp.integer.grids import cannot
from qexp.integer.layers.affine import counted
from qexp.integer.layers.moves import padded, permuted, reshaped, unified
from qexp.integer.layers.resample import averaged
from qexp.integer.layers.shapes import pair, windows
from qexp.integer.lowered import Site
from qexp.integer.program import MaxPool, SumPool
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import operations
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
    """An average is a sum whose unit is smaller; windows that count fewer pixels weigh more."""
    window, padding, stride = pair(layer.kernel_size), pair(layer.padding), pair(layer.stride or layer.kernel_size)
    size = windows(x.shape, window, stride, padding, ceil=layer.ceil_mode)
    counts = _counts(x, layer, size)
    x = _summands(walk, name, layer, x)
    beyond = [max((n - 1) * s + k - m - 2 * p, 0) for n, s, k, m, p in zip(size, stride, window, x.shape[1:], padding)]
    if any(beyond):  # windows that ceil_mode adds reach beyond the border
        x = padded(walk, name, x, (0, *padding), (0, *(p + more for p, more in zip(padding, beyond))))
        padding = (0, 0)
    if (counts == counts[0, 0]).all():
        return _sum_pool(walk, name, layer, x, window, stride, padding, int(counts[0, 0]))
    whole = math.lcm(*map(int, counts.flat))
    y = _summed(walk, name, x, window, stride, padding, 1)
    y = counted(walk, name, y, (whole // counts)[None], y.unit / whole)
    return walk.site(name, layer, "output", y)


def _counts(x: Value, layer: nn.AvgPool2d, size: tuple[int, int]) -> np.ndarray:
    """Returns the number by which the sum of each window is divided, `[h, w]`."""
    if layer.divisor_override:
        return np.full(size, layer.divisor_override)
    counts = []
    settings = (layer.kernel_size, layer.stride or layer.kernel_size, layer.padding)
    for n, many, k, s, p in zip(x.shape[1:], size, *map(pair, settings)):
        first = np.arange(many) * s - p
        last = np.minimum(first + k, n + p if layer.count_include_pad else n)
        counts.append(last - (first if layer.count_include_pad else np.maximum(first, 0)))
    return np.outer(*counts)


def adaptive_pool(walk: Walk, step: Step, name: str, layer: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    """An average over windows, of one size where the map's size is a multiple of the result's."""
    want = [w if w is not None else n for w, n in zip(pair(layer.output_size), x.shape[1:])]
    x = _summands(walk, name, layer, x)
    if any(n % w for n, w in zip(x.shape[1:], want)):
        return walk.site(name, layer, "output", averaged(walk, name, x, want))
    window = tuple(n // w for n, w in zip(x.shape[1:], want))
    return _sum_pool(walk, name, layer, x, window, window, (0, 0), math.prod(window))


def mean(walk: Walk, step: Step, name: str, layer: operations.Mean, x: Value) -> Value:
    """A mean over some dimensions."""
    return _over(walk, name, layer, x, averaged=True)


def total(walk: Walk, step: Step, name: str, layer: operations.Sum, x: Value) -> Value:
    """A sum over some dimensions."""
    return _over(walk, name, layer, x, averaged=False)


def _over(walk: Walk, name: str, layer: operations.Mean | operations.Sum, x: Value, averaged: bool) -> Value:
    """Returns a mean or a sum over some dimensions: they come last and are one window."""
    x = _summands(walk, name, layer, x)
    axes = [x.axis_of(d) for d in layer.dims]
    if None in axes or (not layer.keepdim and any(axis < x.batch + x.lead for axis in axes)):
        raise cannot(name, "it averages over the images of a batch", "average over dimensions of an image")
    dims = sorted(axes)
    kept = [k for k in range(len(x.shape)) if k not in dims]
    shape = (
        tuple(1 if k in dims else n for k, n in enumerate(x.shape))
        if layer.keepdim
        else tuple(x.shape[k] for k in kept)
    )
    if not kept:
        raise cannot(name, "it averages over a whole image", "keep the channels")
    if not x.uniform and (x.axis in dims or len(kept) > 1):
        x = unified(walk, name, x)
    x = permuted(walk, name, x, (*kept, *dims))
    n = math.prod(x.shape[len(kept) :])
    x = reshaped(walk, name, x, (math.prod(x.shape[: len(kept)]), n, 1))
    y = _summed(walk, name, x, (n, 1), (n, 1), (0, 0), n if averaged else 1)
    return walk.site(name, layer, "output", reshaped(walk, name, y, shape))


def _summands(walk: Walk, name: str, layer: nn.Module, x: Value) -> Value:
    """Returns the input of an average. The simulation rounds each summand and not the sum: a batch norm before may leave fractions."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if (name, "input") not in walk.lowered.sites and walk.rounds(name):
        walk.lowered.sites[name, "input.0 (wide)"] = Site(x.tensor, x, None, x, quantized=False)
    return x


def _sum_pool(walk: Walk, name: str, layer: nn.Module, x: Value, window, stride, padding, count: int) -> Value:
    return walk.site(name, layer, "output", _summed(walk, name, x, window, stride, padding, count))


def _summed(walk: Walk, name: str, x: Value, window, stride, padding, count: int) -> Value:
    """Returns the sum of each window, in units of its `count`-th part."""
    pixels = window[0] * window[1]
    low, high = min((x.low - int(x.zero.max())) * pixels, 0), max((x.high - int(x.zero.min())) * pixels, 0)
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
    most = None if x.most is None else x.most * (pixels / count)
    return walk.writer.emit(op, Value(op.output, x.unit / count, ZERO, low, high, shape, most, sums))
