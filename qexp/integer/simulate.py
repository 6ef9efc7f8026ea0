"""Simulates the integer program in PyTorch: the quantized network uses the program's own roundings.

A run uses it with `rounding=integer`. The network keeps its form (eager layers, real values). Inside the context each quantizer rounds
with the program's multiplier and shift, weights and biases have the values of their integers, and all sums are float64, which holds
them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.integer.arithmetic import requantized
from qexp.integer.fast_products import quotient
from qexp.integer.fast_statistics import divided, lengths, normalized, shares
from qexp.integer.lowered import Computed, Lowered, Site
from qexp.integer.op import Op
from qexp.integer.products import Divide
from qexp.integer.program import channels
from qexp.integer.statistics import Length, Normalize, UnitLength
from qexp.layers.calls import all_calls
from qexp.layers.quantized import BAKED, Quantized, attribute
from qexp.system.within import evaluating

Keep = Callable[[str, Tensor], None]


class IntegerSite(nn.Module):
    """Replaces a quantizer: takes real values and returns the real values of the program's codes.

    Args:
        site: The program's operations at this site.
        inner: The network's own quantizer, which encodes images.
        keep: Called with the name of the program's tensor and its codes.
    """

    def __init__(self, site: Site, inner: nn.Module, keep: Keep | None) -> None:
        super().__init__()
        self.here, self.inner, self.keep = site, inner, keep

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # any attribute that a layer reads from its quantizer: bits, scale, zero_point ...
            return getattr(super().__getattr__("inner"), name)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes of values that lie on the grid, int64."""
        leaving = self.here.leaving
        x = self.here.place.inside(x, leaving.shape)
        zero, unit = (_spread(v, x, leaving.axis) for v in (leaving.zero, leaving.unit))
        return torch.floor(x.double() / unit + zero + 0.5).long()  # the zero of two opposite levels lies between them

    def forward(self, x: Tensor) -> Tensor:
        here, leaving = self.here, self.here.leaving
        given, x = x, here.place.inside(x, leaving.shape)
        zero, unit = (_spread(v, x, leaving.axis) for v in (leaving.zero, leaving.unit))
        if here.arriving is None:
            codes = self.inner.codes(x.float()).long()
        elif here.op is None:
            codes = (_units(x, leaving.unit, leaving.axis) + zero).clamp(leaving.low, leaving.high)
        else:
            op = here.op
            factor, addend, shift = (_spread(v, x, op.axis) for v in (op.multiplier, op.addend, op.shift))
            units = _units(x, here.arriving.unit, here.arriving.axis)
            codes = requantized(units, factor, addend, shift, op.rounding).clamp(op.low, op.high)
        if self.keep is not None:
            self.keep(here.tensor, codes)
        return here.place.outside((codes - zero).double() * unit, given)


class _Constant(nn.Module):
    """Returns the input as a tensor; `scale` is the real value of one of its integers."""

    gain = None

    def __init__(self, values: np.ndarray, step: np.ndarray) -> None:
        super().__init__()
        self.values = torch.from_numpy(values if values.flags.writeable else np.array(values))
        step = step[:1] if (step == step[0]).all() else step
        self.scale, self.zero_point = torch.from_numpy(np.array(step)), torch.zeros(1)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the integers, int64."""
        return torch.round(x / self.scale.reshape(-1, *[1] * (x.ndim - 1))).long()

    def forward(self, x: Tensor) -> Tensor:
        return self.values.to(x.device).reshape(x.shape)


@contextmanager
def integer_rounding(model: nn.Module, lowered: Lowered, keep: Keep | None = None) -> Iterator[None]:
    """Context manager: the network computes in float64 and rounds as its program does; afterwards it is restored.

    Args:
        model: The network that the program was read from; inside the context it is evaluated and never trained.
        lowered: The program and its sites.
        keep: Called with the name of each tensor of the program that a quantizer makes, and its codes (int64).
    """
    held = [(p, p.data) for p in model.parameters()]
    buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    with all_calls(model), evaluating(model), ExitStack() as stack:
        try:
            model._apply(_wider(model, lowered))
            stack.callback(model.register_forward_pre_hook(_in_float64).remove)
            for (name, site), here in lowered.sites.items():
                stack.callback(_place(model, name, site, here, keep))
            for name, constants in lowered.constants.items():
                stack.callback(_hold(model.get_submodule(name), constants, lowered.steps.get(name, np.ones(1))))
            for name, here in lowered.computed.items():
                stack.callback(_compute(model.get_submodule(name), here))
            yield
        finally:
            stack.close()
            for p, data in held:
                p.data = data
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


def _wider(model: nn.Module, lowered: Lowered) -> Callable[[Tensor], Tensor]:
    """Returns the conversion to float64 of a network's tensors; weights that the program replaces are not copied, and take no memory."""
    replaced = {id(getattr(model.get_submodule(name), s)) for name, sites in lowered.constants.items() for s in sites}

    def wider(x: Tensor) -> Tensor:
        if id(x) in replaced:
            return torch.full((1,), torch.nan, dtype=torch.float64, device=x.device).expand(x.shape)
        return x.double() if x.is_floating_point() else x

    return wider


def _in_float64(module: nn.Module, args: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, Tensor) else x for x in args)


def _place(model: nn.Module, name: str, site: str, here: Site, keep: Keep | None) -> Callable[[], None]:
    """Installs the program's rounding at a site; returns a function that removes it."""
    layer = model.get_submodule(name) if name else model
    if here.quantized:
        inner = layer.site(site)
        setattr(layer, attribute(site), IntegerSite(here, inner, keep))
        return lambda: setattr(layer, attribute(site), inner)
    rounding = IntegerSite(here, nn.Identity(), keep)
    kind = site.split(" ")[0]  # only the program has this site: the tensor is float in the ordinary simulation
    if kind == "output":
        return layer.register_forward_hook(lambda module, args, result: rounding(result)).remove
    before = getattr(layer, attribute(kind), None)
    if isinstance(before, IntegerSite):  # the operand's own quantizer comes first
        setattr(layer, attribute(kind), nn.Sequential(before, rounding))
        return lambda: setattr(layer, attribute(kind), before)
    operand = int(kind.split(".")[1]) if "." in kind else 0

    def hook(module: nn.Module, args: tuple) -> tuple:
        return tuple(rounding(x) if i == operand else x for i, x in enumerate(args))

    return layer.register_forward_pre_hook(hook).remove


def _hold(layer: Quantized, constants: dict[str, np.ndarray], step: np.ndarray) -> Callable[[], None]:
    """Gives a layer the weights, biases or statistics of the program; returns a function that restores its own."""
    before = {site: layer.site(site) for site in constants}
    baked = layer._buffers.pop(BAKED, None)
    for site, values in constants.items():
        setattr(layer, attribute(site), _Constant(values, step))

    def restore() -> None:
        for site, module in before.items():
            setattr(layer, attribute(site), module)
        if baked is not None:
            layer._buffers[BAKED] = baked

    return restore


def _compute(layer: nn.Module, here: Computed) -> Callable[[], None]:
    """Makes a layer compute an operation of the program; returns a function that restores its own computation."""
    leaving, sites = here.leaving, ["input"] if len(here.arriving) == 1 else ["input.0", "input.1"]

    def forward(*xs: Tensor) -> Tensor:
        given = [getattr(layer, attribute(site), nn.Identity())(x) for site, x in zip(sites, xs)]
        inside = [here.place.inside(x, value.shape) for x, value in zip(given, here.arriving)]
        codes = [_units(x, v.unit, v.axis) + _spread(v.zero, x, v.axis) for x, v in zip(inside, here.arriving)]
        y = _computed(here.op, codes)
        y = y.double() * _spread(leaving.unit, y, leaving.axis)
        if isinstance(here.op, Length):
            y = y.reshape(len(y), *leaving.shape)
        else:
            y = here.place.outside(y, given[0])
        return getattr(layer, attribute("output"), nn.Identity())(y)

    layer.forward = forward
    return lambda: layer.__dict__.pop("forward", None)


def _computed(op: Op, codes: list[Tensor]) -> Tensor:
    """Returns the codes that an operation makes."""
    if isinstance(op, Normalize):
        return normalized(op, *codes, *(_spread(v, codes[0], op.axis) for v in (op.sign, op.bias)))
    if isinstance(op, UnitLength):
        return divided(op, *codes)
    if isinstance(op, Length):
        return lengths(op, *codes)
    if isinstance(op, Divide):
        return quotient(op, *codes)
    return shares(op, *codes, torch.from_numpy(np.array(op.table)).to(codes[0].device))


def _units(x: Tensor, unit: np.ndarray, axis: int = 0) -> Tensor:
    """Returns a tensor in units, int64."""
    return torch.floor(x.double() / _spread(unit, x, axis) + 0.5).long()


def _spread(values: np.ndarray, x: Tensor, axis: int = 0) -> Tensor:
    """Returns one value, or one per channel along `axis`, in the shape that broadcasts against `[N, ...]`."""
    return torch.from_numpy(channels(np.array(values), x.ndim, axis)).to(x.device)
