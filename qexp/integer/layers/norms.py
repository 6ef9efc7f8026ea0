"""Batch norms that were not folded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from qexp.integer.arithmetic import nearest, width
from qexp.integer.grids import cannot
from qexp.integer.layers.affine import multiple
from qexp.integer.layers.moves import reshaped, unified
from qexp.integer.layers.weighted import BIAS_BITS, raised, result_range, room
from qexp.integer.program import Conv, Linear, Requantize
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.layers.integer_bn import IntegerBatchNorm2d, bn_constants
from qexp.layers.quantized import Quantized
from qexp.network.graph import Step
from qexp.quantizers.base import Quantizer

BYTE = 127  # greatest weight of runtimes
NEAR = 2.0**-10  # of a step: the greatest error of a result in float64 is far below it


def batch_norm(walk: Walk, step: Step, name: str, layer: nn.BatchNorm2d, x: Value) -> Value:
    """A batch norm that was not folded: absorbed by the accumulator before it, or else one factor per channel."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if isinstance(layer, IntegerBatchNorm2d):
        return integer_norm(walk, name, layer, x)
    if layer.running_mean is None:
        raise cannot(
            name,
            "it has no running statistics and normalises by the batch",
            "choose a network whose batch norms keep them",
        )
    constants = _statistics(layer)
    if isinstance(layer, Quantized):
        walk.lowered.constants[name] = {k: v for k, v in constants.items() if getattr(layer, k) is not None}
    gain = constants["weight"] / np.sqrt(constants["running_var"] + layer.eps)
    summand = constants["bias"] - gain * constants["running_mean"]
    if x.lead:  # rows of numbers, [N * rows, C]: channels come last
        spread = (1,) * (len(x.shape) - 1) + (-1,)
        y = multiple(walk, name, x, gain.reshape(spread), summand.reshape(spread))
        return walk.site(name, layer, "output", y)
    channels = len(gain)
    op = walk.writer.maker(x)
    own = isinstance(op, Conv | Linear) and not op.unit and walk.sole_user(step) and not _sited(walk, x)
    own = own and x.axis == 0 and not isinstance(walk.model.get_submodule(op.layer), nn.ConvTranspose2d)
    inside = x.shape
    if not own and len(inside) < 3:  # numbers, or lines: maps of one pixel, or of height 1
        if x.axis and not x.uniform:
            x = unified(walk, name, x)
        x = reshaped(walk, name, x, (inside[0], 1, *(inside[1:] or (1,))))
    source = walk.writer.value(op.inputs[0]) if own else x
    groups = getattr(op, "groups", 1) if own else channels
    weight, align = (op.weight, op.align) if own else (np.ones((channels, 1, 1, 1), np.int64), 0)
    finer = 0 if walk.writer.as_runtimes else max(room(source, weight, groups) - align, 0)
    parts = np.ones(channels, np.int64) if own else _parts(x, channels, finer, walk.writer.as_runtimes)
    unit = np.abs(gain) * x.unit * 2.0**-finer
    if not walk.writer.as_runtimes:
        parts = _off_ties(summand, unit, parts)
    weight = weight * parts.reshape(-1, *[1] * (weight.ndim - 1))
    unit = unit / parts
    constant = unit < np.abs(summand) * 2.0**-48  # the sum is negligible beside the summand
    sign = np.where(constant, 0, np.where(gain < 0, -1, 1))
    unit = np.where(constant, np.maximum(np.abs(summand), 2.0**-20) / 1024, unit)
    weight = weight * sign.reshape(-1, *[1] * (weight.ndim - 1))
    before = op.bias * parts if own else 0
    if walk.writer.as_runtimes:
        weight, unit, before = _as_32_bits(walk, op if own else None, summand, weight, unit, before)
    bias = nearest(summand / unit).astype(np.int64)
    if own:
        bias = bias + ((sign * before) << finer)
        low, high = result_range(source, weight, groups, align + finer, bias)
        plain = source.even and align + finer == 0
        sums = np.float32(source.unit) * (unit / source.unit).astype(np.float32) if plain else None
        made = replace(x, unit=unit, low=low, high=high, most=None, sums=sums)
        y = walk.writer.rewrite(made, weight=weight, bias=bias, align=align + finer)
    else:
        low, high = result_range(x, weight, groups, finer, bias)
        op = Conv(
            layer=name,
            inputs=(x.tensor,),
            output=walk.writer.fresh(name),
            weight=weight,
            bias=bias,
            zero=x.zero,
            groups=channels,
            align=finer,
        )
        most = np.abs(gain) * x.span + np.abs(summand)
        sums = np.float32(x.unit) * (unit / x.unit).astype(np.float32) if x.even and not finer else None
        y = walk.writer.emit(op, Value(op.output, unit, ZERO, low, high, x.shape, most, sums))
        y = reshaped(walk, name, y, inside)
    return walk.site(name, layer, "output", y)


def _parts(x: Value, channels: int, finer: int, as_runtimes: bool) -> np.ndarray:
    """Returns the parts into which a batch norm divides the step of each channel, so that its summand is rounded finely.

    Channels of a concatenation have codes of different widths: sums of 27 bits, say, beside codes of 8.
    """
    if as_runtimes:
        return np.full(channels, BYTE if width(x.low, x.high) <= 8 else 1)
    reach = np.broadcast_to(np.ceil(x.span / x.unit), (channels,))
    taken = np.ceil(np.log2(np.maximum(reach, 1) + 1)) + 1
    spare = np.maximum(0, np.maximum(np.minimum(BIAS_BITS[0], 30 - taken), np.minimum(BIAS_BITS[1], 26 - taken)))
    return 2 ** np.maximum(spare - finer, 0).astype(np.int64)


def _off_ties(summand: np.ndarray, unit: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Returns parts in which no summand lies half-way between two steps.

    The simulation rounds the result in float64, which falls to either side there; a mean of 24 bits in steps that are powers of two is
    often just half-way.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = summand / unit * parts
        tie = np.abs(steps - np.floor(steps) - 0.5) < NEAR
    return np.where(tie, np.where(parts > 1, parts // 2, 2 * parts), parts)


def _as_32_bits(walk: Walk, op: Conv | Linear | None, summand, weight, unit, before):
    """Returns weights, units and earlier summands in steps so large that 32 bits hold every bias; updates the simulation."""
    steps = unit
    weight, unit = raised(np.abs(summand) + np.abs(before) * steps, weight, unit)
    more = unit / steps
    if op is not None and (more > 1).any():
        spread = [-1, *[1] * (weight.ndim - 1)]
        held = walk.lowered.constants[op.layer]
        held["weight"] = (
            np.abs(weight) * np.sign(held["weight"]) * (more * walk.lowered.steps[op.layer]).reshape(spread)
        )
        before = nearest(before / more).astype(np.int64)
        if "bias" in held:
            held["bias"] = before * more * walk.writer.program.tensors[op.output].unit
    return weight, unit, before


def integer_norm(walk: Walk, name: str, layer: IntegerBatchNorm2d, x: Value) -> Value:
    """A batch norm of `<bit,intbit>` constants: a requantization whose factor and summand they are."""
    leaving = layer.steps.leaving
    unit = layer._unit().detach().cpu().numpy()
    op = walk.writer.maker(x)
    if isinstance(op, Conv | Linear) and not op.unit:  # the convolution's bias is part of the summand
        x = walk.writer.rewrite(
            replace(
                x, unit=unit if (unit != unit[0]).any() else unit[:1], most=None, sums=None, **_plain_sums(walk, op)
            ),
            bias=op.bias * 0,
            align=0,
        )
    if not np.allclose(x.unit, unit, rtol=1e-9):
        raise cannot(name, "its input is not in the steps of the layer before", "quantize that layer's input")
    bias = layer._bias_before()
    step = layer._unit() if leaving is None else torch.as_tensor(leaving.scale).detach().double().flatten()
    ones = torch.ones_like(bias), torch.zeros_like(bias)
    gamma, beta = (layer.quantized_weight(), layer.quantized_bias()) if layer.affine else ones
    norm = (gamma, beta, layer.running_mean.double() - bias, layer.running_var, layer.eps)
    k, t = bn_constants(norm, layer._unit() / step, 1 / step, layer.bit, layer.intbit, layer.form)
    low, high = (-(2**47), 2**47) if leaving is None else map(int, layer._limits(leaving))
    unit = step.cpu().numpy()
    rescaled = Requantize(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        multiplier=k.cpu().numpy(),
        addend=t.cpu().numpy(),
        shift=np.array([layer.bit - layer.intbit]),
        zero=x.zero,
        rounding=layer.rounding,
        low=low,
        high=high,
    )
    y = walk.writer.apply(rescaled, x, unit, ZERO)
    below_its_grid = layer.clamp == "source" and layer.output_quantizer is leaving
    return y if below_its_grid else walk.site(name, layer, "output", y)


def _plain_sums(walk: Walk, op: Conv | Linear) -> dict[str, int]:
    low, high = result_range(walk.writer.value(op.inputs[0]), op.weight, getattr(op, "groups", 1), 0, op.bias * 0)
    return {"low": low, "high": high}


def _sited(walk: Walk, value: Value) -> bool:
    """Whether this tensor is compared with the simulation."""
    return any(s.tensor == value.tensor for s in walk.lowered.sites.values())


def _statistics(layer: nn.BatchNorm2d) -> dict[str, np.ndarray]:
    """Returns weight, bias, mean and variance of each channel, float64, as evaluation uses them."""

    def real(site: str, fallback: float) -> np.ndarray:
        tensor = getattr(layer, site)
        if tensor is None:
            return np.full(layer.num_features, fallback)
        quantizer = layer.site(site) if isinstance(layer, Quantized) else None
        tensor = quantizer(tensor) if isinstance(quantizer, Quantizer) else tensor
        return tensor.detach().cpu().double().numpy()

    return {s: real(s, v) for s, v in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))}
