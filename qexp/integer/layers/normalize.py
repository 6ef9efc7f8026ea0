"""Conversion of layer norms, group norms and instance norms: mean, root and quotient in whole numbers."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import cannot
from qexp.integer.layers.moves import unified
from qexp.integer.lowered import Computed
from qexp.integer.statistics import Normalize
from qexp.integer.values import Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step

INPUT_BITS = 16
FINER, FRACTION = (
    8,
    14,
)  # the root has 2^-8 steps and the quotient 2^-14, where 64 bits hold them: a relative error below 1e-4
WORD = 61


def layer_norm(walk: Walk, step: Step, name: str, layer: nn.LayerNorm, x: Value) -> Value:
    """A layer norm over the last dimension, or over all of them."""
    dims = len(layer.normalized_shape)
    size = math.prod(layer.normalized_shape)
    if tuple(x.shape[-dims:]) != tuple(layer.normalized_shape):
        raise cannot(
            name, f"it normalizes {list(layer.normalized_shape)} of {list(x.shape)}", "normalize the last dimension"
        )
    if dims > 1 and layer.weight is not None:
        raise cannot(
            name, "its weight has several dimensions", "use elementwise_affine=False, or normalize one dimension"
        )
    return _normalized(walk, name, layer, x, math.prod(x.shape) // size, len(x.shape) - 1, layer.weight, layer.bias)


def group_norm(walk: Walk, step: Step, name: str, layer: nn.GroupNorm, x: Value) -> Value:
    """A group norm: runs of channels."""
    return _normalized(walk, name, layer, x, layer.num_groups, 0, layer.weight, layer.bias)


def instance_norm(walk: Walk, step: Step, name: str, layer: nn.InstanceNorm2d, x: Value) -> Value:
    """An instance norm: each channel is a run of its own."""
    if layer.track_running_stats:
        raise cannot(name, "it keeps running statistics", "use track_running_stats=False, or nn.BatchNorm2d")
    return _normalized(walk, name, layer, x, x.shape[0], 0, layer.weight, layer.bias)


def _normalized(walk: Walk, name: str, layer: nn.Module, x: Value, groups: int, axis: int, weight, bias) -> Value:
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if not x.even or width(x.low, x.high) > INPUT_BITS:
        at = f"{{layers: {name}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 16, symmetric: false}}}}"
        reason = f"a norm over an image's values needs an input of one scale and at most {INPUT_BITS} bits"
        raise cannot(name, reason, f"add deploy=integer, or a rule: '+quant.rules.norm={at}'")
    if x.zero.size > 1:
        x = unified(walk, name, x)
    n = math.prod(x.shape) // groups
    span, greatest = x.high - x.low, max(abs(x.low), abs(x.high))
    if width(0, (n * greatest) ** 2) > WORD:
        raise cannot(
            name, f"the squares of {n} codes of {width(x.low, x.high)} bits exceed 64 bits", "give its input 8 bits"
        )
    finer = max(min(FINER, (WORD - width(0, (n * span) ** 2)) // 2), 0)
    fraction = min(FRACTION, WORD - 1 - width(0, n * span) - finer)
    eps = int(nearest(layer.eps * (n / float(x.unit[0])) ** 2 * 4.0**finer))
    gain, summand = (
        np.full(1, v) if t is None else t.detach().cpu().double().numpy() for t, v in ((weight, 1.0), (bias, 0.0))
    )
    gain, summand = np.broadcast_arrays(gain, summand)
    constant = (
        np.abs(gain) * 2.0**-fraction < np.abs(summand) * 2.0**-40
    )  # the quotient is negligible beside the summand
    unit = np.where(
        constant, np.maximum(np.abs(summand), 2.0**-20) / 1024, np.maximum(np.abs(gain), 2.0**-40) * 2.0**-fraction
    )
    sign = np.where(constant | (gain == 0), 0, np.sign(gain)).astype(np.int64)
    whole = nearest(summand / unit).astype(np.int64)
    least = max(math.isqrt(max(n - 1, 1) * 4**finer), 1)  # the smallest root of codes that are not all equal
    most = math.ceil(math.sqrt(n) * 2**fraction * (least + 1) / least) + 1
    op = Normalize(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        groups=groups,
        finer=finer,
        fraction=fraction,
        eps=eps,
        sign=sign,
        bias=whole,
        axis=axis,
    )
    low, high = -most + int(whole.min()), most + int(whole.max())
    unit = unit[:1] if (unit == unit[0]).all() else unit
    y = walk.writer.emit(op, Value(op.output, unit, np.zeros(1, np.int64), low, high, x.shape, axis=axis))
    walk.lowered.computed[name] = Computed((x,), op, y)
    return walk.site(name, layer, "output", y)
