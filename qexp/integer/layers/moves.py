"""Conversion of operations that move codes: flattening, reshaping, permuting, slicing, padding, shuffling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from qexp.integer.grids import CannotLowerError, cannot
from qexp.integer.lowered import Site
from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.products import Resample
from qexp.integer.program import Linear
from qexp.integer.values import ZERO, Value
from qexp.integer.walk import Walk
from qexp.models import modules, operations
from qexp.network.graph import PerImage, Step

CHANNELWISE = ("unit", "zero", "most", "sums")  # fields of a value with one number, or one per channel
_MIXED = "its shape mixes images of a batch"


def strided_pad(walk: Walk, step: Step, name: str, layer: modules.StridedPad, x: Value) -> Value:
    """The parameter-free shortcut: new channels hold zero."""
    x = walk.integers(x, name)
    if not x.uniform:
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


def flatten(walk: Walk, step: Step, name: str, layer: nn.Flatten | None, x: Value) -> Value:
    """Flattens everything but the batch, or the dimensions that the layer names."""
    first, last = (layer.start_dim, layer.end_dim) if layer is not None else (1, -1)
    return flattened(walk, name, x, first, last)


def flattened(walk: Walk, name: str, x: Value, first: int, last: int) -> Value:
    """Returns a value whose dimensions `first` to `last` (the batch counted) are one."""
    whole = first % x.ndim == 0 and last % x.ndim == x.ndim - 1
    start, stop = x.axis_of(first), x.axis_of(last)
    if start is None and stop is not None and not x.batch and not whole:  # [N, parts, ...] -> [N * parts, ...]
        return replace(reshaped(walk, name, x, (math.prod(x.shape[: stop + 1]), *x.shape[stop + 1 :])), lead=1)
    if start is None or stop is None:
        raise cannot(name, "it joins the images of a batch", "flatten from dimension 1 on: torch.flatten(x, 1)")
    if start < x.batch + x.lead <= stop:
        raise cannot(name, "it joins the images of a batch", "move the images to dimension 0 before: x.permute(...)")
    y = reshaped(walk, name, x, (*x.shape[:start], math.prod(x.shape[start : stop + 1]), *x.shape[stop + 1 :]))
    return replace(y, batch=x.batch - (stop - start) * (stop < x.batch + x.lead))


def unflatten(walk: Walk, step: Step, name: str, layer: nn.Unflatten, x: Value) -> Value:
    """Splits one dimension into several."""
    at = x.axis_of(layer.dim)
    sizes = list(layer.unflattened_size)
    if at is None or x.batch:
        raise cannot(name, "it splits the batch", "split another dimension")
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.shape[at] // -math.prod(sizes)
    return reshaped(walk, name, x, (*x.shape[:at], *sizes, *x.shape[at + 1 :]))


def reshaped(walk: Walk, name: str, x: Value, shape: Sequence[int]) -> Value:
    """Returns a value in another shape (without the batch); one unit per channel becomes one per feature where channels are flattened."""
    shape = tuple(shape)
    if shape == x.shape:
        return x
    if not x.tensor:
        return replace(x, shape=shape)
    x, kept = _kept(walk, name, x, shape)
    if kept.dims > 1 and x.axis and (whole := _unified_before(walk, x)) is not None:
        return reshaped(walk, name, whole, shape)
    spread = {
        k: v if v is None or v.size == 1 else np.tile(np.repeat(v, kept.each), kept.times)
        for k, v in _fields(x).items()
    }
    names = {"layer": name, "inputs": (x.tensor,), "output": walk.writer.fresh(name)}
    op = Flatten(**names) if len(shape) == 1 else Reshape(shape=shape, **names)
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=shape, axis=kept.axis, dims=kept.dims, **spread))


def _unified_before(walk: Walk, x: Value) -> Value | None:
    """Returns the result of a linear layer with one unit for all channels, where these come last and are about to be taken apart.

    The simulation rounds at the layer. None if the tensor is not that of a linear layer.
    """
    maker = walk.writer.maker(x)
    if not isinstance(maker, Linear) or (maker.layer, "output") in walk.lowered.sites:
        return None
    key = maker.layer, "output (wide)"
    if key in walk.lowered.sites:
        return None
    ((whole,), (op,)) = walk.writer.settle([x], maker.layer, f"{maker.layer}.wide")
    walk.lowered.sites[key] = Site(whole.tensor, x, op, whole, quantized=False)
    return replace(whole, axis=0, dims=1, most=None)


@dataclass(frozen=True)
class _Kept:
    """The channels after a reshaping: they spread over `dims` dimensions from `axis` on.

    Each is a run of `each` entries there, and all together come `times` times.
    """

    axis: int = 0
    dims: int = 1
    each: int = 1
    times: int = 1


def _kept(walk: Walk, name: str, x: Value, shape: tuple[int, ...]) -> tuple[Value, _Kept]:
    """Returns a value and its channels after a reshaping; units that no dimensions can hold there become one unit before."""
    end = x.axis + x.dims
    ahead, channels, behind = x.shape[: x.axis], math.prod(x.shape[x.axis : end]), x.shape[end:]
    # the channels alone, or with dimensions behind them, or with some ahead of them as well
    for joined in [(0, b) for b in range(len(behind) + 1)] + [
        (a, b) for a in range(1, len(ahead) + 1) for b in range(len(behind) + 1)
    ]:
        times, each = math.prod(ahead[len(ahead) - joined[0] :]), math.prod(behind[: joined[1]])
        before, wanted = math.prod(ahead[: len(ahead) - joined[0]]), channels * each * times
        for axis in range(len(shape)):
            for dims in range(1, len(shape) - axis + 1):
                if math.prod(shape[:axis]) == before and math.prod(shape[axis : axis + dims]) == wanted:
                    return x, _Kept(axis, dims, each, times)
    return unified(walk, name, x), _Kept()


def unified(walk: Walk, name: str, x: Value) -> Value:
    """Returns a value with one unit and one zero point for all channels."""
    if not x.uniform:
        if x.dims > 1 or not walk.rounds(name):
            remedy = "give the layer before it an output quantizer of one scale (quant.output)"
            raise CannotLowerError(name, "it mixes channels that have different scales", remedy, walk.source(x))
        x = walk.settle([x], name, ["input.0"])[0]
    most = None if x.most is None else np.max(x.most, keepdims=True).reshape(1)
    sums = x.sums if x.sums is None or x.sums.size == 1 else None
    return replace(x, most=most, sums=sums, axis=0, dims=1)


def permuted(walk: Walk, name: str, x: Value, order: Sequence[int]) -> Value:
    """Returns a value whose dimensions (without the batch) are in another order."""
    order = tuple(order)
    shape = tuple(x.shape[k] for k in order)
    if order == tuple(range(len(order))):
        return x
    if not x.tensor:
        return replace(x, shape=shape)
    places = [order.index(k) for k in range(x.axis, x.axis + x.dims)]
    if max(places) - min(places) >= x.dims:  # the channels come apart
        x, places = unified(walk, name, x), [0]
    inner = x.shape[x.axis : x.axis + x.dims]
    turned = np.argsort(places)
    fields = {
        k: v if v is None or v.size == 1 else v.reshape(inner).transpose(turned).ravel() for k, v in _fields(x).items()
    }
    op = Permute(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), order=order)
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=shape, axis=min(places), **fields))


def permute_of(walk: Walk, name: str, x: Value, dims: Sequence[int]) -> Value:
    """Returns a value permuted by dimensions that count the batch."""
    order = [x.axis_of(d) for d in dims]
    y = permuted(walk, name, x, [*range(x.lead), *(k for k in order if k is not None)])
    return replace(y, batch=order.index(None))


def unbound(walk: Walk, name: str, x: Value, dim: int) -> tuple[Value, ...]:
    """Returns the entries of a value along a dimension (the batch counted) as values of their own."""
    axis, dim = x.axis_of(dim), dim % x.ndim
    if axis is None:
        raise cannot(name, "it takes the batch apart", "take a dimension of an image apart")
    batch = x.batch - (dim < x.batch)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    parts = [sliced(walk, name, x, axis, k, 1) for k in range(x.shape[axis])]
    return tuple(replace(reshaped(walk, name, part, shape), batch=batch) for part in parts)


def sliced(walk: Walk, name: str, x: Value, axis: int, start: int, count: int, step: int = 1) -> Value:
    """Returns some entries of a value along a dimension (without the batch)."""
    if (start, count, step) == (0, x.shape[axis], 1):
        return x
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    chosen = _fields(x)
    if x.axis <= axis < x.axis + x.dims:
        if x.dims > 1:
            x = walk.integers(x, name)
        at = start + step * np.arange(count)
        chosen = {k: v if v is None or v.size == 1 else v[at] for k, v in chosen.items()}
    if not x.tensor:
        return replace(x, shape=shape)
    op = Slice(
        layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), axis=axis, start=start, step=step, count=count
    )
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=shape, **chosen))


def padded(walk: Walk, name: str, x: Value, before: Sequence[int], after: Sequence[int], real: float = 0.0) -> Value:
    """Returns a value with a constant around it; only zero has a code on every grid."""
    before, after = tuple(before), tuple(after)
    for axis, (front, back) in enumerate(zip(before, after)):  # a negative padding cuts off
        if front < 0 or back < 0:
            cut = max(-front, 0), max(-back, 0)
            x = sliced(walk, name, x, axis, cut[0], x.shape[axis] - sum(cut))
    before, after = (tuple(max(n, 0) for n in ends) for ends in (before, after))
    if not any((*before, *after)):
        return x
    x = walk.integers(x, name)
    if x.zero.size > 1 or ((before[x.axis] or after[x.axis]) and not x.even):
        x = unified(walk, name, x)
    steps = real / float(x.unit[0]) if x.even else (0.0 if real == 0 else math.nan)
    if not steps == round(steps, 6) // 1:
        raise cannot(name, f"its padding with {real:g} lies between two codes", "pad with zeros")
    value = int(x.zero[0]) + round(steps)
    op = Pad(layer=name, inputs=(x.tensor,), output=walk.writer.fresh(name), before=before, after=after, value=value)
    shape = tuple(n + a + b for n, a, b in zip(x.shape, before, after))
    low, high = min(x.low, value), max(x.high, value)
    most = x.most if value == int(x.zero[0]) else None
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=shape, low=low, high=high, most=most))


def pad(walk: Walk, step: Step, name: str, layer: nn.Module, x: Value) -> Value:
    """A border of zeros, of another constant, or of copies of what lies inside."""
    sizes = tuple(layer.sizes if isinstance(layer, operations.Pad) else layer.padding)
    mode, value = getattr(layer, "mode", _MODES.get(type(layer), "constant")), getattr(layer, "value", None) or 0.0
    pairs = [(sizes[k], sizes[k + 1]) for k in range(0, len(sizes), 2)][::-1]
    pairs = [(0, 0)] * (len(x.shape) - len(pairs)) + pairs
    if len(pairs) > len(x.shape):
        raise cannot(name, "it pads the batch", "pad the dimensions of an image")
    if mode == "constant":
        return padded(walk, name, x, *zip(*pairs), float(value))
    if len(x.shape) != 3 or pairs[0] != (0, 0) or min(min(pair) for pair in pairs) < 0:
        raise cannot(name, f"mode={mode!r} on a tensor {list(x.shape)}", "pad height and width of a map")
    return bordered(walk, name, x, pairs[1], pairs[2], mode)


_MODES = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate", nn.CircularPad2d: "circular"}
_BORDERS = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def bordered(walk: Walk, name: str, x: Value, rows: tuple[int, int], columns: tuple[int, int], mode: str) -> Value:
    """Returns a map with copies of its own pixels around it."""
    x = walk.integers(x, name)
    places = [np.pad(np.arange(n), ends, mode=_BORDERS[mode])[:, None] for n, ends in zip(x.shape[1:], (rows, columns))]
    ones = [np.ones_like(at) for at in places]
    op = Resample(
        layer=name,
        inputs=(x.tensor,),
        output=walk.writer.fresh(name),
        rows=places[0],
        row_weights=ones[0],
        columns=places[1],
        column_weights=ones[1],
        zero=ZERO,
    )
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=(x.shape[0], len(places[0]), len(places[1]))))


def permute(walk: Walk, step: Step, name: str, layer: operations.Permute, x: Value) -> Value:
    """Dimensions in another order."""
    return permute_of(walk, name, x, layer.dims)


def transpose(walk: Walk, step: Step, name: str, layer: operations.Transpose, x: Value) -> Value:
    """Two dimensions exchanged."""
    dims = list(range(x.ndim))
    a, b = layer.dims
    dims[a], dims[b] = dims[b], dims[a]
    return permute_of(walk, name, x, dims)


def reshape(walk: Walk, step: Step, name: str, layer: operations.Reshape, x: Value) -> Value:
    """The same elements in another shape."""
    if x.batch:
        raise cannot(name, "the images of its batch are not in dimension 0", "move them there: x.permute(...)")
    whole = math.prod(x.shape)
    first, *sizes = layer.sizes
    if any(isinstance(size, PerImage) for size in sizes):
        raise cannot(name, _MIXED, "keep the images in dimension 0: torch.flatten(x, 1)")
    parts = first.each if isinstance(first, PerImage) and first.fixed == 0 else None
    if first == -1 and -1 not in sizes and whole % math.prod(sizes) == 0:
        parts = whole // math.prod(sizes)
    if parts is None:
        raise cannot(name, _MIXED, "keep the images in dimension 0: torch.flatten(x, 1)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = whole // (-math.prod(sizes) * parts)
    if math.prod(sizes) * parts != whole:
        raise cannot(name, _MIXED, "keep the images in dimension 0: torch.flatten(x, 1)")
    lead = int(parts > 1)
    return replace(reshaped(walk, name, x, (*[parts] * lead, *sizes)), lead=lead)


def split(walk: Walk, step: Step, name: str, layer: operations.Split, x: Value) -> tuple[Value, ...]:
    """Parts along a dimension."""
    axis = x.axis_of(layer.dim)
    if axis is None:
        raise cannot(name, "it takes the batch apart", "split a dimension of an image")
    n = x.shape[axis]
    sizes = -(-n // layer.parts) if layer.sizes is None else layer.sizes
    if isinstance(sizes, int):
        sizes = [min(sizes, n - start) for start in range(0, n, sizes)]
    starts = np.cumsum([0, *sizes])
    return tuple(sliced(walk, name, x, axis, int(start), size) for start, size in zip(starts, sizes))


def index(walk: Walk, step: Step, name: str, layer: operations.Index, x: Value) -> Value:
    """A part of a tensor: slices, single entries, and new dimensions."""
    given = list(layer.index) if isinstance(layer.index, tuple) else [layer.index]
    taken = sum(1 for entry in given if entry is not None and entry is not Ellipsis)
    if Ellipsis in given:
        at = given.index(Ellipsis)
        given[at : at + 1] = [slice(None)] * (x.ndim - taken)
    shape, axis, batch = list(x.shape[: x.lead]), x.lead, None
    dims = 0  # of the network's tensor that are behind
    for entry in given:
        if entry is None and (batch is not None or x.batch > dims):
            shape.append(1)
            continue
        if dims == x.batch:
            if not isinstance(entry, slice) or entry != slice(None):
                raise cannot(name, "it chooses images of the batch", "index the dimensions of an image: x[:, ...]")
            batch = len(shape) - x.lead
            dims += 1
            continue
        n = x.shape[axis]
        if isinstance(entry, int):
            x = sliced(walk, name, x, axis, entry % n, 1)
        elif isinstance(entry, slice) and not any(isinstance(v, PerImage) for v in (entry.start, entry.stop)):
            start, stop, step_ = entry.indices(n)
            x = sliced(walk, name, x, axis, start, len(range(start, stop, step_)), step_)
            shape.append(x.shape[axis])
        else:
            raise cannot(name, f"the index {entry!r} has no integer form", "use slices and numbers")
        axis, dims = axis + 1, dims + 1
    if batch is None:
        batch = len(shape) - x.lead + x.batch - dims
    return replace(reshaped(walk, name, x, (*shape, *x.shape[axis:])), batch=batch)


def squeeze(walk: Walk, step: Step, name: str, layer: operations.Squeeze, x: Value) -> Value:
    """A tensor without those of some dimensions that have one entry."""
    axes = [x.axis_of(dim) for dim in layer.dims]
    if None in axes:
        raise cannot(name, "it may drop the dimension of the batch", "name dimensions of an image: x.squeeze(1)")
    gone = [axis for axis in axes if x.shape[axis] == 1]
    before = sum(axis - x.lead < x.batch for axis in gone)
    shape = [n for axis, n in enumerate(x.shape) if axis not in gone]
    return replace(reshaped(walk, name, x, shape), batch=x.batch - before)


def roll(walk: Walk, step: Step, name: str, layer: operations.Roll, x: Value) -> Value:
    """Entries moved along dimensions; those that leave at one end come in at the other."""
    x = walk.integers(x, name)
    for shift, dim in zip(layer.shifts, layer.dims):
        axis = x.axis_of(dim)
        if axis is None:
            raise cannot(name, "it moves the images of a batch", "roll the dimensions of an image")
        n = x.shape[axis]
        if first := -shift % n:
            ends = sliced(walk, name, x, axis, first, n - first), sliced(walk, name, x, axis, 0, first)
            op = Concat(layer=name, inputs=tuple(e.tensor for e in ends), output=walk.writer.fresh(name), axis=axis)
            x = walk.writer.emit(op, replace(x, tensor=op.output))
    return x


def repeated(walk: Walk, name: str, x: Value, axis: int, times: int) -> Value:
    """Returns a value whose only entry along a dimension comes several times."""
    if axis == x.axis and not x.uniform:
        x = unified(walk, name, x)
    op = Concat(layer=name, inputs=(x.tensor,) * times, output=walk.writer.fresh(name), axis=axis)
    shape = (*x.shape[:axis], times, *x.shape[axis + 1 :])
    return walk.writer.emit(op, replace(x, tensor=op.output, shape=shape))


def pixel_shuffle(walk: Walk, step: Step, name: str, layer: nn.PixelShuffle, x: Value) -> Value:
    """[C r r, H, W] -> [C, H r, W r]."""
    return shuffled(walk, name, x, layer.upscale_factor)


def shuffled(walk: Walk, name: str, x: Value, r: int) -> Value:
    """Returns maps that are `r` times as high and wide, from `r * r` as many channels."""
    c, h, w = x.shape
    x = unified(walk, name, x) if x.tensor else x
    x = permuted(walk, name, reshaped(walk, name, x, (c // (r * r), r, r, h, w)), (0, 3, 1, 4, 2))
    return reshaped(walk, name, x, (c // (r * r), h * r, w * r))


def pixel_unshuffle(walk: Walk, step: Step, name: str, layer: nn.PixelUnshuffle, x: Value) -> Value:
    """[C, H r, W r] -> [C r r, H, W]."""
    r, (c, h, w) = layer.downscale_factor, x.shape
    x = permuted(walk, name, reshaped(walk, name, x, (c, h // r, r, w // r, r)), (0, 2, 4, 1, 3))
    return reshaped(walk, name, x, (c * r * r, h // r, w // r))


def channel_shuffle(walk: Walk, step: Step, name: str, layer: nn.ChannelShuffle, x: Value) -> Value:
    """The channels of groups take turns."""
    c, h, w = x.shape
    x = permuted(walk, name, reshaped(walk, name, x, (layer.groups, c // layer.groups, h, w)), (1, 0, 2, 3))
    return reshaped(walk, name, x, (c, h, w))


def _fields(x: Value) -> dict[str, np.ndarray | None]:
    return {k: getattr(x, k) for k in CHANNELWISE}
