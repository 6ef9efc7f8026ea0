"""Finds subclasses of convolutions and linear layers that compute what their base class computes, by running both.

A subclass with a `forward` of its own may compute anything. Here it runs on the network's images and on random ones, and so does the
`forward` of its base class with the subclass's weights:

* Where the results are equal to the bit, the layer counts as one of its base class.
* A convolution that pads its input first, by amounts that depend on its size, counts as one with these borders, at this size of images.
* A weight that is computed from the parameter in each call (standardised weights) becomes the parameter, and the layer one of the base
  class, as weight norm is made permanent; training goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qexp.layers.calls import function_name
from qexp.layers.forms import Form, form
from qexp.layers.quantized import AT_SIZE, COMPUTES_AS, QUANTIZED, WEIGHTED, float_class
from qexp.layers.swap import evaluating
from qexp.system.within import hooked

log = logging.getLogger(__name__)
_NEAR = 1e-5  # of the result's norm: another order of the same operations


@torch.no_grad()
def adopt(model: nn.Module, images: Any) -> None:
    """Lets layers of subclasses count as their base class, in place, where they compute the same; the network computes the same."""
    mine = {n: m for n, m in model.named_modules() if _is_candidate(m)}
    if not mine:
        return
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = (*args, *kwargs.values())
            if len(given) == 1 and isinstance(given[0], Tensor):
                seen.setdefault(name, given[0].detach().clone())

        return hook

    with evaluating(model), torch.random.fork_rng(devices=[]):
        with hooked(m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in mine.items()):
            model(images)
        for name, x in seen.items():
            _adopt(name, mine[name], x)


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or not isinstance(module, WEIGHTED):
        return False
    if module._parameters.get("weight") is None:  # it is computed from other parameters (`qexp.passes.permanent`)
        return False
    return float_class(module) not in QUANTIZED and "forward" not in vars(module)


def _adopt(name: str, layer: nn.Module, x: Tensor) -> None:
    base = next(kind for kind in type(layer).__mro__ if kind in QUANTIZED)
    spread = x.std() if x.numel() > 1 else 1.0
    inputs = [x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * spread]
    expected = [layer(given) for given in inputs]
    if _computes(base, layer, inputs, expected, exactly=True):
        vars(layer)[COMPUTES_AS] = base
        return
    call = _product(base, layer, x)
    if call is None:
        return
    held = dict(vars(layer))
    if base is nn.Conv2d and (border := _border(layer, call, x)) is not None:
        layer.padding_mode, layer._reversed_padding_repeated_twice = "constant", border
        vars(layer)[AT_SIZE] = tuple(x.shape[2:])
    if call.constants["weight"] is layer.weight and _computes(base, layer, inputs, expected):
        vars(layer)[COMPUTES_AS] = base
        return
    weight, bias, kind = layer.weight, layer.bias, type(layer)
    layer.weight = nn.Parameter(call.constants["weight"].detach().clone().to(weight))
    if bias is not None and call.constants["bias"] is not None:
        layer.bias = nn.Parameter(call.constants["bias"].detach().clone().to(bias))
    if (bias is None) == (call.constants["bias"] is None) and _computes(base, layer, inputs, expected):
        layer.__class__ = base
        log.info("%s (%s): the weight that it computes in each call is its parameter from here on", name, kind.__name__)
        if AT_SIZE in vars(layer):
            vars(layer)[COMPUTES_AS] = base
        return
    layer.weight, layer.bias = weight, bias
    vars(layer).clear()
    vars(layer).update(held)


def _computes(
    base: type[nn.Module], layer: nn.Module, inputs: list[Tensor], expected: list[Tensor], exactly: bool = False
) -> bool:
    """Whether the base class computes with this layer's attributes what the layer itself does."""
    try:
        got = [base.forward(layer, x) for x in inputs]
    except Exception:  # attributes that the base class does not understand
        return False
    if any(not isinstance(y, Tensor) or y.shape != z.shape for y, z in zip(expected, got)):
        return False
    if exactly:
        return all(map(torch.equal, got, expected))
    return all(float((a - b).norm()) <= _NEAR * float(b.norm()) for a, b in zip(got, expected))


class _Products(TorchFunctionMode):
    """Keeps the calls of one kind of product."""

    def __init__(self, base: type[nn.Module]) -> None:
        super().__init__()
        self.base = base
        self.found: list[Form] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = form(function_name(func), args, kwargs or {})
        if found is not None and found.kind is self.base:
            self.found.append(found)
        return func(*args, **(kwargs or {}))


def _product(base: type[nn.Module], layer: nn.Module, x: Tensor) -> Form | None:
    """Returns the only product of the base class's kind that a layer computes; None if there are several."""
    with _Products(base) as products:
        layer(x)
    return products.found[0] if len(products.found) == 1 else None


def _border(layer: nn.Module, call: Form, x: Tensor) -> list[int] | None:
    """Returns the zeros (left, right, top, bottom) around a convolution's input; None where they are the layer's own padding."""
    padded, own = call.operands[0], call.options["padding"]
    if isinstance(own, str):
        return None
    down, across = (own, own) if isinstance(own, int) else own
    if padded.shape == x.shape:
        return None if (down, across) == tuple(layer.padding) else [across, across, down, down]
    high, wide = padded.shape[2] - x.shape[2], padded.shape[3] - x.shape[3]
    for top in range(high + 1):
        for left in range(wide + 1):
            if torch.equal(F.pad(x, (left, wide - left, top, high - top)), padded):
                return [left + across, wide - left + across, top + down, high - top + down]
    return None
