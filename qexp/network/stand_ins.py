"""Gives the function calls of a network that could carry quantizers their stand-ins, in place."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qexp.layers.calls import Call, all_calls, calls, can_route, install, remove, standing, use_all, use_needed
from qexp.layers.forms import STEPS, Form
from qexp.layers.quantized import QUANTIZED, WEIGHTED, Quantized, float_class
from qexp.layers.swap import evaluating, quantizers_off
from qexp.models.attention import Attention
from qexp.network.attention import take_apart
from qexp.network.graph import near, same
from qexp.network.made_calls import MadeCall
from qexp.network.recorder import Recording, record, several
from qexp.network.subclasses import adopt

log = logging.getLogger(__name__)
_KINDS = {*QUANTIZED, *STEPS, Attention}


def recorded(model: nn.Module, example: Tensor) -> Recording:
    """Returns the recording of a network in which function calls have stand-ins, in place; its results do not change.

    Every call of a type that could carry quantizers gets one, except in modules of this package. In a float network all stand-ins are in
    use, so that edits of the network can replace them; in a quantized one those that carry a quantizer.
    """
    quantized = any(isinstance(module, Quantized) for module in model.modules())
    if not quantized:
        adopt(model, several(example))
        take_apart(model, several(example))
    try:
        with all_calls(model):
            seen = record(model, example)
        if _install(model, seen, example):
            with all_calls(model):
                seen = record(model, example)
        return seen
    finally:
        (use_needed if quantized else use_all)(model)


def _install(model: nn.Module, seen: Recording, example: Tensor) -> int:
    """Gives each call without one its stand-in; returns their number. Where the network's result changes, none gets one."""
    new: list[tuple[nn.Module, str]] = []
    before: Any = None
    for (owner_name, local), made in seen.made.items():
        owner, found = model.get_submodule(owner_name), _form(made)
        if found is None or local in calls(owner) or _is_ours(owner) or not can_route(owner):
            continue
        read = _read_by(owner, owner_name, made, seen) if found.kind in WEIGHTED else ""
        if read is None:
            continue
        if not new:
            before = _result(model, example)
        call = Call(made.kind, made.number, made.of, found.kind, found.options, read)
        install(owner, local, call, None if read else standing(found))
        new.append((owner, local))
    alike = near if any(calls(owner)[local].form is Attention for owner, local in new) else same
    if new and not alike(before, _result(model, example)):
        for owner, local in new:
            remove(owner, local)
        log.info(
            "%s: its function calls carry no quantizers, since it computes something else in each run",
            type(model).__name__,
        )
        return 0
    return len(new)


def _is_ours(owner: nn.Module) -> bool:
    """Whether a module is of this package, whose networks hold a module for each call that a recipe may name."""
    return type(owner).__module__.startswith("qexp.")


def _read_by(owner: nn.Module, owner_name: str, made: MadeCall, seen: Recording) -> str | None:
    """Returns the layer whose parameters a product takes, by its name inside the module that computes it; None if there is no such layer.

    `F.linear(x, self.proj.weight, self.proj.bias)` is a call of `proj`, if nothing else calls `proj`.
    """
    form = made.forms[0]
    for name, layer in owner.named_modules():
        if not name or float_class(layer) is not form.kind or f"{owner_name}.{name}".strip(".") in seen.shapes:
            continue
        if all(_own(layer, k, v) for k, v in form.constants.items()) and _configured(layer, form):
            return name if len(made.forms) == 1 else None
    return None


def _own(layer: nn.Module, key: str, given: Tensor | None) -> bool:
    """Whether a call takes a layer's own parameter; of a bias a copy will do, which has zeros for a part that is not to be learned."""
    own = getattr(layer, key)
    return own is given or (key == "bias" and own is not None and given is not None and torch.equal(own, given))


def _configured(layer: nn.Module, form: Form) -> bool:
    """Whether a layer has the arguments of a call: stride, padding and so on."""
    with torch.device("meta"):
        alike = form.kind(**form.options)
    return all(getattr(layer, name, None) == getattr(alike, name, None) for name in form.kind.__constants__)


def _form(made: MadeCall) -> Form | None:
    """Returns the form of a call; None where it could carry no quantizer, or is not of one form in each run of its module."""
    first = made.forms[0]
    if first is None or first.kind not in _KINDS:
        return None
    return first if all(f is not None and f.kind is first.kind for f in made.forms) else None


@torch.no_grad()
def _result(model: nn.Module, example: Tensor) -> Any:
    images = several(example)
    images = [image.clone() for image in images] if isinstance(images, list) else images.clone()
    with evaluating(model), quantizers_off(model), all_calls(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return model(images)
        except Exception:  # it does not run on two images
            torch.manual_seed(0)
            return model(example)
