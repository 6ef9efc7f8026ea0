"""Conversion of constant multiples and summands: the size of a factor is in the unit, a summand is a whole number of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import cannot
from qexp.integer.layers.moves import unified
from qexp.integer.lowered import Site
from qexp.integer.products import Affine
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import operations
from qexp.network.graph import Step

SUM_BITS = 31  # of a multiple with its summand: wider ones leave their requantization too few bits
STEPS = 24  # bits by which a summand's step may be finer than the tensor's


def affine(walk: Walk, step: Step, name: str, layer: operations.Affine, x: Value) -> Value:
    """A multiple plus a summand, each one number, one per channel, or one per element."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    gain, summand = (_real(walk, name, v, x) for v in (layer.factor, layer.summand))
    return walk.site(name, layer, "output", multiple(walk, name, x, gain, summand))


def _real(walk: Walk, name: str, constant: object, x: Value) -> np.ndarray:
    """Returns a constant in float64, in a shape that spreads over a value without its batch."""
    values = torch.as_tensor(constant, dtype=torch.float64).detach().cpu().numpy()
    values = values.reshape((1,) * max(x.ndim - values.ndim, 0) + values.shape)
    if values.ndim > x.ndim or values.shape[x.batch] != 1:
        raise cannot(name, "its constant differs between the images of a batch", "use one constant for all images")
    values = np.moveaxis(values, x.batch, 0)
    values = values if x.lead else values[0]
    if not np.isfinite(values).all():
        raise cannot(name, "its constant is not finite", "use finite numbers")
    return values


def multiple(walk: Walk, name: str, x: Value, gain: np.ndarray, summand: np.ndarray) -> Value:
    """Returns `gain * x + summand`, exactly but for the summand, which is rounded to a step."""
    if x.left is not None and x.left[0] == x.tensor:
        summand = summand + gain * x.left[1]
    axis = _axis(gain)
    if axis is None:
        raise cannot(
            name, f"its factor {list(gain.shape)} differs along several dimensions", "use one factor per channel"
        )
    if gain.size > 1 and not x.uniform and x.axis != axis:
        x = unified(walk, name, x)
    axis = axis if gain.size > 1 else x.axis
    shape = tuple(np.broadcast_shapes(x.shape, gain.shape, summand.shape))
    if shape != x.shape:
        raise cannot(
            name, f"its constant spreads {list(x.shape)} to {list(shape)}", "use a constant of the tensor's size"
        )
    unit = np.abs(gain.ravel()) * x.unit
    unit = np.where(unit > 0, unit, max(float(np.abs(summand).max(initial=0)), 2.0**-20) / 1024)
    shift = _finer(x, summand, unit, axis)
    unit = unit * 2.0**-shift
    along = _along(unit, axis, len(shape))
    bias = nearest(summand / along).astype(np.int64)
    factor = np.sign(gain).astype(np.int64)
    ends = [
        ((end - int(z)) * s << shift)
        for end in (x.low, x.high)
        for z in (x.zero.min(), x.zero.max())
        for s in {*factor.flat}
    ]
    low, high = min(ends) + int(bias.min()), max(ends) + int(bias.max())
    op = Affine(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        factor=factor,
        bias=bias,
        zero=x.zero,
        shift=shift,
        axis=x.axis,
    )
    unit = unit[:1] if (unit == unit[0]).all() else unit
    most = None if summand.any() or x.most is None else x.most * np.abs(gain.ravel())
    y = walk.writer.emit(op, Value(op.output, unit, ZERO, low, high, shape, most, None, axis if unit.size > 1 else 0))
    left = summand - bias * along
    if left.any() and walk.rounds(name):  # between two steps; the simulation rounds here, too
        walk.lowered.sites[name, "output (wide)"] = Site(y.tensor, y, None, y, quantized=False)
    elif left.any():
        return replace(y, left=(y.tensor, left))
    return y


def counted(walk: Walk, name: str, x: Value, parts: np.ndarray, unit: np.ndarray) -> Value:
    """Returns a value whose element at a place is multiplied by a whole number, in another unit."""
    reach = int(parts.max()) * x.reach
    op = Affine(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        factor=parts,
        bias=ZERO,
        zero=x.zero,
        axis=x.axis,
    )
    return walk.writer.emit(op, replace(x, tensor=op.output, unit=unit, zero=ZERO, low=-reach, high=reach, sums=None))


def _axis(values: np.ndarray) -> int | None:
    """Returns the only dimension along which values differ in number; 0 for one number, None for several dimensions."""
    long = [k for k, n in enumerate(values.shape) if n > 1]
    return None if len(long) > 1 else (long[0] if long else 0)


def _along(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return values.reshape([-1 if k == axis else 1 for k in range(ndim)]) if values.size > 1 else values.reshape(())


def _finer(x: Value, summand: np.ndarray, unit: np.ndarray, axis: int) -> int:
    """Returns by how many bits the step becomes finer, so that rounding the summand to it loses little."""
    if not summand.any():
        return 0
    along = _along(unit, axis, summand.ndim)
    taken = max(width(-x.reach, x.reach), int(np.ceil(np.log2(np.abs(summand / along).max() + 2))) + 1)
    for shift in range(max(min(STEPS, SUM_BITS - taken), 0) + 1):
        steps = summand / along * 2.0**shift
        if np.array_equal(steps, np.rint(steps)):
            return shift
    return max(min(8, SUM_BITS - taken), 0)
