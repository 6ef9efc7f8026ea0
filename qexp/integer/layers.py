"""What each type of layer becomes in integers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import fx, nn

from qexp.integer import families
from qexp.integer.arithmetic import nearest, width
from qexp.integer.bounds import by_output
from qexp.integer.grids import Grid, activation_grid, cannot, integer_weight, is_power_of_two
from qexp.integer.hardware import winograd
from qexp.integer.lowering import Site, Walk
from qexp.integer.program import Clamp, Concat, Conv, Flatten, Linear, Lookup, MaxPool, Requantize, StridedPad, SumPool
from qexp.integer.values import Value
from qexp.layers import quantized as layers
from qexp.layers.integer_bn import IntegerBatchNorm2d, bn_constants
from qexp.layers.swap import quantizers_off
from qexp.models import modules
from qexp.quantizers.base import Quantizer

_ZERO = np.zeros(1, np.int64)
BIAS_BITS = (
    8,
    16,
)  # of a bias below the accumulator's last bit: as many as int32 has room for, the most as 26 bits have
TABLE_BITS = 16
MOST_ALIGN = 24  # for a bias on power-of-two steps of its own


def weighted(walk: Walk, node: fx.Node, name: str, layer: nn.Module, x: Value) -> Value:
    """A convolution or linear layer: integer weights, a bias in units of the accumulator."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    quantizer = getattr(layer, "weight_quantizer", None)
    if not isinstance(quantizer, Quantizer):
        remedy = "give it bits (layer_wbit, or a rule), or choose a method for weights"
        raise cannot(f"{name}.weight", "the weight is float", remedy)
    how = families.unit(layer, name)
    weight, unit = integer_weight(layer.weight, quantizer, f"{name}.weight")
    walk.lowered.steps[name] = unit
    if weight.ndim == 4 and layer.padding_mode != "zeros":
        raise cannot(name, f"padding_mode={layer.padding_mode!r}", "use padding_mode='zeros'")
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
        name, layer, unit if word is None else np.repeat(word.scale, len(unit)), _room(x, weight, groups)
    )
    constants = walk.lowered.constants.setdefault(name, {"weight": _real(weight, unit, x, groups)})
    if layer.bias is not None:
        constants["bias"] = bias * result
    low, high = _result(x, weight, groups, align, bias) if word is None else (word.low, word.high)
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
    if weight.ndim == 4:
        padding = _padding(name, layer)
        op = Conv(stride=_pair(layer.stride), padding=padding, dilation=_pair(layer.dilation), groups=groups, **fields)
        shape = (len(weight), *_windows(x.shape, weight.shape[2:], op.stride, padding, op.dilation))
        if how.get("name") == "winograd" and (
            not winograd.suits(op, x.shape) or winograd.lossless(replace(op, unit=how), x.reach)
        ):
            if not winograd.suits(op, x.shape) and layer.stride != (1, 1) and weight.shape[2] > 1 and groups == 1:
                raise cannot(
                    name, "the nine 3x3 kernels of a strided one may saturate", "use compute.clamp_int16=false"
                )
            how = {}
        op = replace(op, unit=how)
    else:
        if len(x.shape) != 1:
            raise cannot(name, f"a linear layer on maps {list(x.shape)}", "flatten before it")
        op, shape = Linear(unit=how, **fields), (len(weight),)
    result = result[:1] if (result == result[0]).all() else result
    y = walk.writer.emit(op, Value(op.output, result, _ZERO, low, high, shape))
    return walk.site(name, layer, "output", y)


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
            "its channels have scales of their own, which are no powers of two and cannot be moved through the sum over channels",
            "use granularity: tensor for this input, or power-of-two scales (quant=inq_shift, fixed_point)",
        )
    return weight * factor.astype(np.int64).reshape(*factor.shape, *[1] * (weight.ndim - 2)), unit * least


def _real(weight: np.ndarray, unit: np.ndarray, x: Value, groups: int) -> np.ndarray:
    """Returns the weights' real values: what was absorbed of the input's units comes out again."""
    spread = [1] * (weight.ndim - 1)
    values = weight * unit.reshape(-1, *spread)
    inside = np.broadcast_to(x.unit, (weight.shape[1] * groups,)).reshape(groups, -1)
    return values / np.repeat(inside, len(weight) // groups, axis=0).reshape(*weight.shape[:2], *spread[1:])


def _bias(name: str, layer: nn.Module, unit: np.ndarray, room: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Returns the bias in units of the result, the left shift of the sum before it, and that unit.

    The shift makes the unit finer, so that little is lost when the bias is rounded to it; of a bias on power-of-two steps nothing is.
    """
    if layer.bias is None:
        return np.zeros(len(unit), np.int64), 0, unit
    bias = layer.quantized_bias() if isinstance(layer, layers.Quantized) else layer.bias
    real = bias.detach().cpu().double().numpy()
    align, steps = 0, real / unit
    while align < MOST_ALIGN and not np.array_equal(steps * 2.0**align, np.rint(steps * 2.0**align)):
        align += 1
    align = align if align < MOST_ALIGN and is_power_of_two(unit) else room
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


def _result(x: Value, weight: np.ndarray, groups: int, align: int, bias: np.ndarray) -> tuple[int, int]:
    """Returns between which numbers the result of a layer stays."""
    least, most = by_output(weight, x.zero, groups, x.low, x.high)
    return int(((least << align) + bias).min()), int(((most << align) + bias).max())


def _room(x: Value, weight: np.ndarray, groups: int) -> int:
    """Returns how many bits a bias may have below the accumulator's last one."""
    least, most = by_output(weight, x.zero, groups, x.low, x.high)
    taken = width(int(least.min()), int(most.max()))
    return max(0, min(BIAS_BITS[0], 30 - taken), min(BIAS_BITS[1], 26 - taken))


def _padding(name: str, layer: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(layer.padding, str):
        return _pair(layer.padding)
    left = layer._reversed_padding_repeated_twice
    if left[0] != left[1] or left[2] != left[3]:
        raise cannot(name, f"padding={layer.padding!r} adds more on one side", "use an odd kernel, or numbers")
    return left[2], left[0]


def batch_norm(walk: Walk, node: fx.Node, name: str, layer: nn.BatchNorm2d, x: Value) -> Value:
    """A batch norm that was not folded: absorbed by the accumulator before it, else a factor a channel of its own."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if isinstance(layer, IntegerBatchNorm2d):
        return integer_norm(walk, name, layer, x)
    constants = _statistics(layer)
    if isinstance(layer, layers.Quantized):
        walk.lowered.constants[name] = {k: v for k, v in constants.items() if getattr(layer, k) is not None}
    gain = constants["weight"] / np.sqrt(constants["running_var"] + layer.eps)
    summand = constants["bias"] - gain * constants["running_mean"]
    channels = len(gain)
    op = walk.writer.maker(x)
    own = isinstance(op, Conv | Linear) and not op.unit and walk.sole_user(node) and not _sited(walk, x)
    source = walk.writer.value(op.inputs[0]) if own else x
    groups = getattr(op, "groups", 1) if own else channels
    weight, align = (op.weight, op.align) if own else (np.ones((channels, 1, 1, 1), np.int64), 0)
    finer = max(_room(source, weight, groups) - align, 0)
    unit = np.abs(gain) * x.unit * 2.0**-finer
    constant = unit < np.abs(summand) * 2.0**-48  # what the sum adds is lost beside the summand
    sign = np.where(constant, 0, np.where(gain < 0, -1, 1))
    unit = np.where(constant, np.maximum(np.abs(summand), 2.0**-20) / 1024, unit)
    weight = weight * sign.reshape(-1, *[1] * (weight.ndim - 1))
    bias = nearest(summand / unit).astype(np.int64)
    if own:
        bias = bias + ((sign * op.bias) << finer)
        low, high = _result(source, weight, groups, align + finer, bias)
        made = replace(x, unit=unit, low=low, high=high)
        y = walk.writer.rewrite(made, weight=weight, bias=bias, align=align + finer)
    else:
        low, high = _result(x, weight, groups, finer, bias)
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
        y = walk.writer.emit(op, Value(op.output, unit, _ZERO, low, high, x.shape))
    return walk.site(name, layer, "output", y)


def integer_norm(walk: Walk, name: str, layer: IntegerBatchNorm2d, x: Value) -> Value:
    """A batch norm of `<bit,intbit>` constants: a requantization whose factor and summand they are."""
    leaving = layer.steps.leaving
    unit = layer._unit().detach().cpu().numpy()
    op = walk.writer.maker(x)
    if isinstance(op, Conv | Linear) and not op.unit:  # what the convolution adds is in the summand
        x = walk.writer.rewrite(
            replace(x, unit=unit if (unit != unit[0]).any() else unit[:1], **_plain_sums(walk, op)),
            bias=op.bias * 0,
            align=0,
        )
    if not np.allclose(x.unit, unit, rtol=1e-9):
        raise cannot(
            name, "what arrives is not counted in the steps of the layer before", "quantize that layer's input"
        )
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
    y = walk.writer.apply(rescaled, x, unit, _ZERO)
    below_its_grid = layer.clamp == "source" and layer.output_quantizer is leaving
    return y if below_its_grid else walk.site(name, layer, "output", y)


def _plain_sums(walk: Walk, op: Conv | Linear) -> dict[str, int]:
    low, high = _result(walk.writer.value(op.inputs[0]), op.weight, getattr(op, "groups", 1), 0, op.bias * 0)
    return {"low": low, "high": high}


def _sited(walk: Walk, value: Value) -> bool:
    """Whether somebody compares this very tensor with the simulation."""
    return any(s.tensor == value.tensor for s in walk.lowered.sites.values())


def _statistics(layer: nn.BatchNorm2d) -> dict[str, np.ndarray]:
    """Returns weight, bias, mean and variance of each channel, float64, as evaluation uses them."""

    def real(site: str, fallback: float) -> np.ndarray:
        tensor = getattr(layer, site)
        if tensor is None:
            return np.full(layer.num_features, fallback)
        quantizer = layer.site(site) if isinstance(layer, layers.Quantized) else None
        tensor = quantizer(tensor) if isinstance(quantizer, Quantizer) else tensor
        return tensor.detach().cpu().double().numpy()

    return {s: real(s, v) for s, v in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))}


def relu(walk: Walk, node: fx.Node, name: str, layer: nn.Module | None, x: Value, top: float = math.inf) -> Value:
    """A ReLU is a clamp of codes."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    y = _clamp(walk, name, x, top)
    return walk.site(name, layer, "output", y)


def relu6(walk: Walk, node: fx.Node, name: str, layer: nn.Module | None, x: Value) -> Value:
    """A ReLU6 clamps at the code nearest to 6, too."""
    return relu(walk, node, name, layer, x, 6.0)


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
    return walk.writer.emit(op, Value(op.output, x.unit, x.zero, least, most, x.shape))


def add(walk: Walk, node: fx.Node, name: str, layer: nn.Module, *xs: Value) -> Value:
    """A residual add: operands are brought to power-of-two steps, unless they are on one grid."""
    xs = [walk.integers(walk.site(name, layer, f"input.{i}", x), name) for i, x in enumerate(xs)]
    xs = walk.settle(list(xs), name, [f"input.{i}" for i in range(len(xs))])
    return walk.site(name, layer, "output", walk.writer.add(xs, name))


def concat(walk: Walk, node: fx.Node, name: str, layer: modules.Concat, *xs: Value) -> Value:
    """A concatenation: steps may differ from channel to channel until the next quantizer, zero points may not."""
    xs = [walk.integers(x, name) for x in xs]
    if layer.dim != 1 or any(int(np.abs(x.zero).max()) for x in xs):
        raise cannot(
            name, "its operands have zero points, or it is not along the channels", "use symmetric codes before it"
        )
    unit = np.concatenate([np.broadcast_to(x.unit, (x.shape[0],)) for x in xs])
    unit = unit[:1] if (unit == unit[0]).all() else unit
    shape = (sum(x.shape[0] for x in xs), *xs[0].shape[1:])
    op = Concat(layer=name, inputs=tuple(x.tensor for x in xs), output=walk.writer.fresh(name))
    y = walk.writer.emit(op, Value(op.output, unit, _ZERO, min(x.low for x in xs), max(x.high for x in xs), shape))
    return walk.site(name, layer, "output", y)


def max_pool(walk: Walk, node: fx.Node, name: str, layer: nn.MaxPool2d, x: Value) -> Value:
    """The greatest code is the code of the greatest value."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    window, padding, dilation = _pair(layer.kernel_size), _pair(layer.padding), _pair(layer.dilation)
    stride = _pair(layer.stride)
    size = _windows(x.shape, window, stride, padding, dilation, layer.ceil_mode)
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


def average_pool(walk: Walk, node: fx.Node, name: str, layer: nn.AvgPool2d, x: Value) -> Value:
    """An average is a sum whose unit is smaller."""
    if layer.ceil_mode or layer.divisor_override or (any(_pair(layer.padding)) and not layer.count_include_pad):
        raise cannot(
            name, "its windows count different numbers of pixels", "use ceil_mode=False and count_include_pad=True"
        )
    return _sum_pool(walk, name, layer, x, _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding))


def adaptive_pool(walk: Walk, node: fx.Node, name: str, layer: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    """An average over windows of one size."""
    want = [w if w is not None else n for w, n in zip(_pair(layer.output_size), x.shape[1:])]
    if any(n % w for n, w in zip(x.shape[1:], want)):
        raise cannot(name, f"{list(x.shape[1:])} is no multiple of its output {want}", "choose another image size")
    window = tuple(n // w for n, w in zip(x.shape[1:], want))
    return _sum_pool(walk, name, layer, x, window, window, (0, 0))


def _sum_pool(walk: Walk, name: str, layer: nn.Module, x: Value, window, stride, padding) -> Value:
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if (
        name,
        "input",
    ) not in walk.lowered.sites:  # each summand is rounded, not the sum: a batch norm before may leave fractions
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
    shape = (x.shape[0], *_windows(x.shape, window, stride, padding))
    y = walk.writer.emit(op, Value(op.output, x.unit / count, _ZERO, low, high, shape))
    return walk.site(name, layer, "output", y)


def table(walk: Walk, node: fx.Node, name: str, layer: nn.Module, x: Value) -> Value:
    """Any other activation: a table with one entry for each code of its input, rounded half up to the result's grid."""
    x = walk.integers(walk.site(name, layer, "input", x), name)
    if not x.even or x.zero.size > 1 or width(x.low, x.high) > TABLE_BITS:
        reason = (
            f"a table needs an input of one scale and at most {TABLE_BITS} bits, this one has {width(x.low, x.high)}"
        )
        raise cannot(name, reason, "quantize its input (deploy=integer)")
    if sum(p.numel() for p in layer.parameters(recurse=False)) > 1:
        raise cannot(name, "its channels have slopes of their own", "use nn.PReLU() with one slope")
    codes = np.arange(x.low, x.high + 1)
    with quantizers_off(layer):
        values = copy.deepcopy(layer).double()(torch.from_numpy((codes - x.zero) * x.unit)).detach().numpy()
    quantizer = layer.site("output") if isinstance(layer, layers.Quantized) else None
    if isinstance(quantizer, Quantizer):
        grid = activation_grid(quantizer, f"{name}.output")
    else:
        unit = 2.0 ** (np.ceil(np.log2(max(float(np.abs(values).max()), 1e-30))) - 15)
        grid = Grid(np.array([unit]), _ZERO, -(2**15), 2**15, "half_up")
    if grid.scale.size > 1:
        raise cannot(f"{name}.output", "its channels have scales of their own", "use granularity: tensor there")
    entries = (nearest(values / grid.scale).astype(np.int64) + grid.zero).clip(grid.low, grid.high)
    low, high = int(entries.min()), int(entries.max())
    op = Lookup(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), table=entries, low=x.low)
    y = walk.writer.emit(op, Value(op.output, grid.scale, grid.zero, low, high, x.shape))
    quantized = isinstance(quantizer, Quantizer)
    walk.lowered.sites[name, "output" if quantized else "output (wide)"] = Site(y.tensor, y, None, y, quantized)
    return y


def strided_pad(walk: Walk, node: fx.Node, name: str, layer: modules.StridedPad, x: Value) -> Value:
    """The parameter-free shortcut: new channels hold zero."""
    x = walk.integers(x, name)
    if x.unit.size > 1 or x.zero.size > 1:
        x = walk.settle([x], name, ["input"])[0]
    shape = (x.shape[0] + layer.before + layer.after, *(math.ceil(n / layer.stride) for n in x.shape[1:]))
    op = StridedPad(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        stride=layer.stride,
        before=layer.before,
        after=layer.after,
        zero=x.zero,
    )
    low, high = min(x.low, int(x.zero[0])), max(x.high, int(x.zero[0]))
    return walk.writer.emit(op, Value(op.output, x.unit, x.zero, low, high, shape))


def flatten(walk: Walk, node: fx.Node, name: str, layer: nn.Module | None, x: Value) -> Value:
    """Maps become features; a unit a channel becomes one a feature."""
    if len(x.shape) == 1:
        return x
    size = math.prod(x.shape)
    if not x.tensor:
        return replace(x, shape=(size,))
    per = size // x.shape[0]
    unit, zero = (np.repeat(v, per) if v.size > 1 else v for v in (x.unit, x.zero))
    op = Flatten(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name))
    return walk.writer.emit(op, replace(x, tensor=op.output, unit=unit, zero=zero, shape=(size,)))


def passed(walk: Walk, node: fx.Node, name: str, layer: nn.Module, x: Value) -> Value:
    """What does nothing in evaluation."""
    return x


def _flatten_call(walk: Walk, node: fx.Node, where: str) -> Value:
    x = walk.operand(node.args[0], where)
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    if start != 1 or len(node.args) > 2 or "end_dim" in node.kwargs:
        raise cannot(where, "it does not flatten everything but the batch", "use torch.flatten(x, 1)")
    return flatten(walk, node, where, None, x)


def _view_call(walk: Walk, node: fx.Node, where: str) -> Value:
    x, sizes = walk.operand(node.args[0], where), node.args[1:]
    if len(sizes) != 2 or (sizes[1] != -1 and not isinstance(sizes[1], fx.Node) and sizes[1] != math.prod(x.shape)):
        raise cannot(where, "it is no flattening", "use torch.flatten(x, 1)")
    return flatten(walk, node, where, None, x)


def _size_call(walk: Walk, node: fx.Node, where: str) -> Value:
    return walk.operand(node.args[0], where)  # read by a view alone, which ignores it


def _relu_call(walk: Walk, node: fx.Node, where: str) -> Value:
    return relu(walk, node, where, None, walk.operand(node.args[0], where))


def _relu6_call(walk: Walk, node: fx.Node, where: str) -> Value:
    return relu6(walk, node, where, None, walk.operand(node.args[0], where))


def _passed_call(walk: Walk, node: fx.Node, where: str) -> Value:
    return walk.operand(node.args[0], where)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _windows(shape, window, stride, padding, dilation=(1, 1), ceil: bool = False) -> tuple[int, int]:
    """Returns how many windows there are along height and width."""
    counts = []
    for n, k, s, p, d in zip(shape[1:], window, stride, padding, dilation):
        room = n + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil else room // s) + 1
        counts.append(count - 1 if ceil and (count - 1) * s >= n + p else count)
    return tuple(counts)


LAYERS: dict[type[nn.Module], Callable] = {
    nn.Conv2d: weighted,
    nn.Linear: weighted,
    nn.BatchNorm2d: batch_norm,
    nn.ReLU: relu,
    nn.ReLU6: relu6,
    nn.MaxPool2d: max_pool,
    nn.AvgPool2d: average_pool,
    nn.AdaptiveAvgPool2d: adaptive_pool,
    nn.Flatten: flatten,
    nn.Identity: passed,
    nn.Dropout: passed,
    nn.PReLU: table,
    nn.SiLU: table,
    nn.Hardswish: table,
    nn.Sigmoid: table,
    nn.Tanh: table,
    nn.GELU: table,
    modules.Add: add,
    modules.Concat: concat,
    modules.StridedPad: strided_pad,
}
FUNCTIONS: dict[Callable, Callable] = {
    torch.flatten: _flatten_call,
    torch.relu: _relu_call,
    torch.nn.functional.relu: _relu_call,
    torch.nn.functional.relu6: _relu6_call,
    torch.nn.functional.dropout: _passed_call,
}
METHODS: dict[str, Callable] = {
    "flatten": _flatten_call,
    "view": _view_call,
    "reshape": _view_call,
    "size": _size_call,
    "contiguous": _passed_call,
    "relu": _relu_call,
}
