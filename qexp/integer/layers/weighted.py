"""Convolutions and linear layers: integer weights, biases in units of the accumulator."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from qexp.integer import families
from qexp.integer.arithmetic import nearest, width
from qexp.integer.bounds import by_output
from qexp.integer.grids import activation_grid, cannot, integer_weight, is_power_of_two
from qexp.integer.hardware import winograd
from qexp.integer.layers.moves import bordered, padded, reshaped, unified
from qexp.integer.layers.shapes import pair, windows
from qexp.integer.layers.transposed import spread_out, turned, turned_back
from qexp.integer.program import Conv, Linear
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.layers.quantized import Quantized
from qexp.network.graph import Step
from qexp.quantizers.accumulator_bias import MOST, AccumulatorBias
from qexp.quantizers.base import Quantizer

# bits of a bias below the accumulator's last bit: as many as fit into int32, at most as with 26 bits
BIAS_BITS = (8, 16)
ZEROS = ("zeros", "constant")  # names of borders of zeros
WEIGHT_BITS = 16  # of a float weight that is exact in integers
MOST_ALIGN = 24  # for a bias on power-of-two steps of its own


def weighted(walk: Walk, step: Step, name: str, layer: nn.Module, x: Value) -> Value:
    """A convolution or linear layer: integer weights, a bias in units of the accumulator."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    quantizer, whole = getattr(layer, "weight_quantizer", None), None
    if not isinstance(quantizer, Quantizer) and (whole := _whole_weight(layer)) is None:
        remedy = "give it bits (layer_wbit, or a rule), or choose a method for weights"
        raise cannot(f"{name}.weight", "the weight is float", remedy)
    how = families.unit(layer, name)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    arrange = partial(turned, layer) if transposed else None
    weight, unit = whole or integer_weight(layer.weight, quantizer, f"{name}.weight", x.reach, arrange)
    if not how:
        weight, unit = raised(_real_bias(layer) / x.unit.min(), weight, unit)
    walk.lowered.steps[name] = unit
    line, geometry = isinstance(layer, nn.Conv1d), layer
    if line:  # a convolution of a map of height 1
        weight, geometry = weight[:, :, None], _flat(layer)
        x = reshaped(walk, name, x, (x.shape[0], 1, *x.shape[1:]))
    if isinstance(layer, nn.Linear) and not x.uniform and x.axis != len(x.shape) - 1:
        x = unified(walk, name, x)
    beyond = not transposed and weight.ndim == 4 and _beyond(geometry)
    if transposed:
        x = spread_out(walk, name, layer, x)
    elif beyond:
        x = _surrounded(walk, name, geometry, x)
    groups = getattr(layer, "groups", 1)
    weight, unit = _absorb(name, x, weight, unit, groups)
    word = None
    if how.get("name") == "fixed_point":  # its sums are rounded to the word of the layer's output
        word = activation_grid(layer.output_quantizer, f"{name}.output")
        how |= {"bits": width(word.low, word.high), "rounding": word.rounding, "bias": layer.bias is not None}
        how["shift"] = round(np.log2(word.scale[0] / unit[0]))
    if how.get("name") == "shift":
        how = families.shift_options(layer, how, unit)
    bias, align, result = _bias(
        name, layer, unit if word is None else np.repeat(word.scale, len(unit)), room(x, weight, groups)
    )
    real = _real(weight, unit, x, groups)
    if walk.rounds(name):
        constants = walk.lowered.constants.setdefault(
            name, {"weight": turned_back(layer, real) if transposed else real}
        )
        if layer.bias is not None:
            constants["bias"] = bias * result
    elif layer.bias is not None:  # its weight is exact, but the simulation could not round its bias
        raise cannot(
            f"{name}.bias", "the bias of a call is float", "use nn.Conv2d, or a quantizer for the call's weight"
        )
    low, high = result_range(x, weight, groups, align, bias) if word is None else (word.low, word.high)
    result = result if word is None else word.scale
    fields = {
        "layer": name,
        "inputs": (x.tensor,),
        "output": walk.writer.fresh(name),
        "weight": weight,
        "bias": bias,
        "zero": x.zero,
        "align": align,
    }
    axis = 0
    if weight.ndim == 4:
        if len(x.shape) != 3 or x.axis:
            raise cannot(name, f"a convolution on a tensor {list(x.shape)}", "give it maps [N, C, H, W]")
        padding = (0, 0) if transposed or beyond else _padding(geometry)
        stride = (1, 1) if transposed else pair(geometry.stride)
        op = Conv(stride=stride, padding=padding, dilation=pair(geometry.dilation), groups=groups, **fields)
        shape = (len(weight), *windows(x.shape, weight.shape[2:], op.stride, padding, op.dilation))
        if how.get("name") == "winograd" and (
            not winograd.suits(op, x.shape) or winograd.lossless(replace(op, unit=how), x.reach)
        ):
            if not winograd.suits(op, x.shape) and layer.stride != (1, 1) and weight.shape[2] > 1 and groups == 1:
                raise cannot(
                    name, "the nine 3x3 kernels of a strided convolution may saturate", "use compute.clamp_int16=false"
                )
            how = {}
        op = replace(op, unit=how)
    else:
        if x.shape[-1] != weight.shape[1]:
            raise cannot(name, f"a linear layer on maps {list(x.shape)}", "flatten before it")
        op, shape, axis = Linear(unit=how, **fields), (*x.shape[:-1], len(weight)), len(x.shape) - 1
    plain = not how and align == 0
    sums = np.float32(x.unit) * np.float32(walk.lowered.steps[name]) if plain and x.even else None
    most = None if how else _spread(x, weight, groups, align, bias) * result
    if (result == result[0]).all():
        result, sums = result[:1], None if sums is None else sums[:1]
    y = walk.writer.emit(op, Value(op.output, result, ZERO, low, high, shape, most, sums, axis))
    y = reshaped(walk, name, y, (shape[0], shape[2])) if line else y
    return walk.site(name, layer, "output", y)


def _whole_weight(layer: nn.Module) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a float weight as integers and the power of two that they count, where that is exact with 16 bits: the filter of a blur."""
    if isinstance(layer, nn.ConvTranspose2d):
        return None
    real = layer.weight.detach().cpu().double().numpy()
    for finer in range(WEIGHT_BITS):
        whole = np.ldexp(real, finer)
        if np.abs(whole).max() >= 2 ** (WEIGHT_BITS - 1):
            return None
        if (whole == np.rint(whole)).all():
            return whole.astype(np.int64), np.full(len(real), 2.0**-finer)
    return None


def _flat(layer: nn.Conv1d) -> nn.Conv2d:
    """Returns the convolution of a map of height 1 that computes what a convolution along a line does."""
    pads = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
    sizes = ((1, *value) for value in (layer.kernel_size, layer.stride))
    with torch.device("meta"):
        return nn.Conv2d(
            *(layer.in_channels, layer.out_channels, *sizes, pads, (1, *layer.dilation), layer.groups),
            padding_mode=layer.padding_mode,
        )


def raised(bias: np.ndarray, weight: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights and units; units are raised by powers of two in channels whose bias exceeds 32 bits.

    Such a channel is dead: its weights are negligible beside its bias, so losing bits of them has no effect.
    """
    steps = np.abs(bias) / unit
    with np.errstate(divide="ignore"):
        more = np.maximum(np.ceil(np.log2(np.maximum(steps, 1) / MOST)), 0)
    if not more.any():
        return weight, unit
    spread = [-1, *[1] * (weight.ndim - 1)]
    return np.rint(weight / np.exp2(more).reshape(spread)).astype(np.int64), unit * np.exp2(more)


def _real_bias(layer: nn.Module) -> np.ndarray:
    """Returns the bias as the layer computes with it, float64; zeros where it has none."""
    if layer.bias is None:
        return np.zeros(getattr(layer, "out_channels", len(layer.weight)))
    bias = layer.quantized_bias() if isinstance(layer, Quantized) else layer.bias
    return bias.detach().cpu().double().numpy()


def _absorb(name: str, x: Value, weight: np.ndarray, unit: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights and units of the accumulator: units of input channels that differ are absorbed into the weights."""
    if x.even:
        return weight, unit * x.unit
    per = weight.shape[1]
    inside = np.repeat(x.unit.reshape(groups, per), len(weight) // groups, axis=0)  # [O, I / groups]
    least = inside.min(axis=1)
    factor = inside / least[:, None]
    if not is_power_of_two(factor):
        raise cannot(
            f"{name}.input",
            "its channels have different scales, which are not powers of two and cannot be moved through the sum over channels",
            "use granularity: tensor for this input, or power-of-two scales (quant=inq_shift, fixed_point)",
        )
    return weight * factor.astype(np.int64).reshape(*factor.shape, *[1] * (weight.ndim - 2)), unit * least


def _real(weight: np.ndarray, unit: np.ndarray, x: Value, groups: int) -> np.ndarray:
    """Returns the weights' real values: what was absorbed of the input's units comes out again."""
    spread = [1] * (weight.ndim - 1)
    values = weight * unit.reshape(-1, *spread)
    if x.even:
        values /= x.unit
        return values
    inside = np.broadcast_to(x.unit, (weight.shape[1] * groups,)).reshape(groups, -1)
    return values / np.repeat(inside, len(weight) // groups, axis=0).reshape(*weight.shape[:2], *spread[1:])


def _bias(name: str, layer: nn.Module, unit: np.ndarray, room: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Returns the bias in units of the result, the left shift of the sum before it, and that unit.

    The shift makes the unit finer, so that rounding the bias to it loses little; a bias on power-of-two steps loses nothing.
    """
    if layer.bias is None:
        return np.zeros(len(unit), np.int64), 0, unit
    real = _real_bias(layer)
    if isinstance(getattr(layer, "bias_quantizer", None), AccumulatorBias):
        return nearest(real / unit).astype(np.int64), 0, unit
    align, steps = 0, real / unit
    while align < MOST_ALIGN and not np.array_equal(steps * 2.0**align, np.rint(steps * 2.0**align)):
        align += 1
    align = align if align < MOST_ALIGN and is_power_of_two(unit) else min(room, _left(steps))
    unit = unit * 2.0**-align
    whole = nearest(real / unit)
    if np.abs(whole).max() >= 2.0**52:
        worst = int(np.abs(whole).argmax())
        raise cannot(
            f"{name}.bias",
            f"the bias of channel {worst} is {whole[worst]:.3g} steps of its accumulator",
            "check the weights of that channel",
        )
    return whole.astype(np.int64), align, unit


def _left(steps: np.ndarray) -> int:
    """Returns how many of the allowed bits the greatest bias leaves unused."""
    return max(int(np.log2(MOST / max(float(np.abs(steps).max(initial=0)), 1.0))), 0)


def result_range(x: Value, weight: np.ndarray, groups: int, align: int, bias: np.ndarray) -> tuple[int, int]:
    """Returns the least and greatest possible result of a layer."""
    least, most = by_output(weight, x.zero, groups, x.low, x.high)
    return int(((least << align) + bias).min()), int(((most << align) + bias).max())


def _spread(x: Value, weight: np.ndarray, groups: int, align: int, bias: np.ndarray) -> np.ndarray:
    """Returns the greatest magnitude of each output, in units of the result."""
    least, most = by_output(weight, x.zero, groups, x.low, x.high)
    return np.maximum(np.maximum(np.abs((least << align) + bias), np.abs((most << align) + bias)), 1).astype(np.float64)


def room(x: Value, weight: np.ndarray, groups: int) -> int:
    """Returns how many bits a bias may have below the accumulator's last one."""
    least, most = by_output(weight, x.zero, groups, x.low, x.high)
    taken = width(int(least.min()), int(most.max()))
    return max(0, min(BIAS_BITS[0], 30 - taken), min(BIAS_BITS[1], 26 - taken))


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    left = layer._reversed_padding_repeated_twice
    given = isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    return (left[2], left[0]) if given else pair(layer.padding)


def _beyond(layer: nn.Conv2d) -> bool:
    """Whether a convolution's border is more than zeros, as many on both sides."""
    left = layer._reversed_padding_repeated_twice
    return layer.padding_mode not in ZEROS or left[0] != left[1] or left[2] != left[3]


def _surrounded(walk: Walk, name: str, layer: nn.Conv2d, x: Value) -> Value:
    """Returns a map with the border that a convolution puts around it."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if layer.padding_mode in ZEROS:
        return padded(walk, name, x, (0, top, left), (0, bottom, right))
    return bordered(walk, name, x, (top, bottom), (left, right), layer.padding_mode)
