"""Conversion of other sizes of maps: copies of codes, or sums of neighbours with whole weights over a common denominator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qexp.integer.arithmetic import width
from qexp.integer.grids import cannot
from qexp.integer.products import Resample
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step

LARGEST_RATIO = 1000  # denominators of scale factors
EXACT_BITS = 50  # sums below it are exact in float64, in which the simulation adds
CUBIC = Fraction(-3, 4)  # torch's coefficient of the cubic kernel
Taps = list[list[tuple[int, Fraction]]]  # for each place of the result: places of the source and their weights


@dataclass(frozen=True)
class Sampling:
    """Arguments of `interpolate`."""

    size: tuple[int, int] | int | None = None
    scale_factor: tuple[float, float] | float | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    recompute: bool | None = None
    antialias: bool = False


def upsample(walk: Walk, step: Step, name: str, layer: nn.Upsample, x: Value) -> Value:
    """Maps of another size."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    how = Sampling(layer.size, layer.scale_factor, layer.mode, layer.align_corners, layer.recompute_scale_factor)
    return walk.site(name, layer, "output", resampled(walk, name, x, how))


def resampled(walk: Walk, name: str, x: Value, how: Sampling) -> Value:
    """Returns maps of another size."""
    if len(x.shape) != 3 or x.axis:
        raise cannot(name, f"it resizes a tensor {list(x.shape)}", "resize maps [N, C, H, W]")
    if how.mode not in ("nearest", "bilinear", "bicubic") or how.antialias:
        mode = f"mode={how.mode!r}" + (" with antialias" if how.antialias else "")
        raise cannot(name, f"{mode} has no integer form", "use nearest, bilinear or bicubic without antialias")
    if how.mode == "nearest":
        rows, columns = ([[(at, Fraction(1))] for at in places] for places in _nearest(x.shape[1:], how))
    else:
        rows, columns = (_interpolated(axis, x.shape[1:], how) for axis in (0, 1))
    return _sampled(walk, name, x, rows, columns, how.mode == "nearest")


def averaged(walk: Walk, name: str, x: Value, size: list[int]) -> Value:
    """Returns the averages over windows whose sizes differ by one: torch's adaptive pooling."""
    ends = [[(i * n // out, -(-(i + 1) * n // out)) for i in range(out)] for n, out in zip(x.shape[1:], size)]
    rows, columns = ([[(at, Fraction(1, b - a)) for at in range(a, b)] for a, b in each] for each in ends)
    return _sampled(walk, name, x, rows, columns)


def _sampled(walk: Walk, name: str, x: Value, rows: Taps, columns: Taps, copies: bool = False) -> Value:
    (rows, row_weights, a), (columns, column_weights, b) = _whole(rows), _whole(columns)
    shape = (x.shape[0], len(rows), len(columns))
    op = Resample(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        rows=rows,
        row_weights=row_weights,
        columns=columns,
        column_weights=column_weights,
        zero=ZERO if copies else x.zero,
    )
    if copies:
        return walk.writer.emit(op, replace(x, tensor=op.output, shape=shape))
    reach = int(np.abs(row_weights).sum(1).max() * np.abs(column_weights).sum(1).max()) * x.reach
    if width(-reach, reach) > EXACT_BITS:
        raise cannot(
            name,
            f"from {list(x.shape[1:])} to {list(shape[1:])} it needs weights of {(a * b).bit_length()} bits on codes of "
            f"{width(x.low, x.high)} bits",
            "give its input 8 bits, or use a factor of 2",
        )
    least = (
        -reach if (row_weights < 0).any() or (column_weights < 0).any() else min((x.low - int(x.zero.max())) * a * b, 0)
    )
    most = reach if least == -reach else max((x.high - int(x.zero.min())) * a * b, 0)
    sums = np.float32(x.unit) * np.float32(1 / (a * b)) if x.even else None
    return walk.writer.emit(op, Value(op.output, x.unit / (a * b), ZERO, least, most, shape, None, sums))


def _target(axis: int, sizes: tuple[int, ...], how: Sampling) -> tuple[int, Fraction]:
    """Returns the size of the result along an axis, and the step through the source per place of the result."""
    given, n = (how.size, how.scale_factor), sizes[axis]
    size, factor = (v[axis] if isinstance(v, tuple | list) else v for v in given)
    out = size if size is not None else math.floor(n * factor)
    if how.align_corners:
        return out, Fraction(n - 1, out - 1) if out > 1 else Fraction(0)
    if factor is not None and not how.recompute:
        return out, 1 / Fraction(factor).limit_denominator(LARGEST_RATIO)
    return out, Fraction(n, out)


def _nearest(sizes: tuple[int, ...], how: Sampling) -> list[list[int]]:
    """Returns the rows and columns that torch copies: it rounds the step through the source to float32, which no formula repeats."""
    found = []
    for axis, n in enumerate(sizes):
        line = (
            torch.arange(n, dtype=torch.float64)
            .reshape((1, 1, n, 1) if axis == 0 else (1, 1, 1, n))
            .expand(1, 1, *sizes)
        )
        options = {"size": how.size, "scale_factor": how.scale_factor, "recompute_scale_factor": how.recompute}
        made = F.interpolate(line.contiguous(), mode="nearest", **options)[0, 0]
        found.append([int(v) for v in (made[:, 0] if axis == 0 else made[0])])
    return found


def _interpolated(axis: int, sizes: tuple[int, ...], how: Sampling) -> Taps:
    """Returns the exact weights of the neighbours along an axis."""
    out, ratio = _target(axis, sizes, how)
    last, taps = sizes[axis] - 1, []
    for i in range(out):
        place = ratio * i if how.align_corners else ratio * (i + Fraction(1, 2)) - Fraction(1, 2)
        if how.mode == "bilinear":
            place = max(place, Fraction(0))
            near = min(math.floor(place), last)
            taps.append([(near, 1 - (place - near)), (min(near + 1, last), place - near)])
        else:
            near = math.floor(place)
            taps.append([(min(max(near + k, 0), last), _cubic(place - near - k)) for k in (-1, 0, 1, 2)])
    return taps


def _cubic(t: Fraction) -> Fraction:
    t, a = abs(t), CUBIC
    if t <= 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return a * (((t - 5) * t + 8) * t - 4)


def _whole(taps: Taps) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns places and whole weights `[places, taps]`, and the denominator of the weights."""
    most = max(map(len, taps))
    taps = [each + [(each[0][0], Fraction(0))] * (most - len(each)) for each in taps]
    denominator = math.lcm(*(weight.denominator for each in taps for _, weight in each))
    places = np.array([[at for at, _ in each] for each in taps], np.int64)
    return places, np.array([[int(w * denominator) for _, w in each] for each in taps], np.int64), denominator
