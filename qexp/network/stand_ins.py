"""Gives the function calls of a network that could carry quantizers their stand-ins, in place."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qexp.layers.calls import Call, all_calls, calls, can_route, install, remove, standing, use_all, use_needed
from qexp.layers.forms import STEPS, Form
from qexp.layers.quantized import QUANTIZED, WEIGHTED, Quantized
from qexp.layers.swap import evaluating, quantizers_off
from qexp.network.graph import same
from qexp.network.made_calls import MadeCall
from qexp.network.recorder import Recording, record, several
from qexp.network.subclasses import adopt

log = logging.getLogger(__name__)
_KINDS = {*QUANTIZED, *STEPS}


def recorded(model: nn.Module, example: Tensor) -> Recording:
    """Returns the recording of a network in which function calls have stand-ins, in place; its results do not change.

    Every call of a type that could carry quantizers gets one, except in modules of this package. In a float network all stand-ins are in
    use, so that edits of the network can replace them; in a quantized one those that carry a quantizer.
    """
    quantized = any(isinstance(module, Quantized) for module in model.modules())
    if not quantized:
        adopt(model, several(example))
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
        if not new:
            before = _result(model, example)
        install(owner, local, Call(made.kind, made.number, made.of, found.kind, found.options), standing(found))
        new.append((owner, local))
    if new and not same(before, _result(model, example)):
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


def _form(made: MadeCall) -> Form | None:
    """Returns the form of a call; None where it could carry no quantizer, or is not of one form in each run of its module."""
    first = made.forms[0]
    if first is None or first.kind not in _KINDS or first.kind in WEIGHTED:
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
