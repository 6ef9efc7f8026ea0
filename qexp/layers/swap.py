"""Surgery: a float layer becomes a quantized one by its class, in place, and back.

Parameters, their names, hooks, tied modules and optimizers built earlier stay what they are; only the class changes and quantizers
are added as submodules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pydoc import locate
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import (
    BAKED,
    QUANTIZED,
    WEIGHTED,
    Quantized,
    attribute,
    float_class,
    quantized_layers,
    quantizers,
    weight_of,
)
from qexp.quantizers.base import Quantizer
from qexp.system.within import evaluating, hooked

WRITTEN_AS = "_written_as"  # the shorthand class of a layer, where it is not the float class itself


def swap(
    layer: nn.Module,
    site_quantizers: Mapping[str, nn.Module],
    compute: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> None:
    """Makes a float layer quantized, in place; sites not named stay float.

    Args:
        layer: A layer of a known type.
        site_quantizers: Quantizer of each site.
        compute: How the layer computes, where not in the ordinary way: `_target_` names a family, a mapping from float class to the
            `Quantized` class that computes so; what else it holds are that class's options, given to its `configure`.
        device: Where the quantizers go; None takes the layer's own, which a layer without parameters does not tell.

    Raises:
        QexpError: Unknown layer type, a site the layer does not have, or a method that refuses the site.
    """
    kind = float_class(layer)
    target, options = _target(kind, compute)
    for site, quantizer in site_quantizers.items():
        if site not in target.sites:
            raise QexpError(f"{kind.__name__} has no site {site!r}; its sites are {', '.join(target.sites)}")
        if isinstance(quantizer, Quantizer) and site.split(".")[0] not in quantizer.sites | _like_weight(quantizer):
            raise QexpError(
                f"{type(quantizer).__name__} cannot sit on {site!r}; it is made for {', '.join(sorted(quantizer.sites))}"
            )
    if not isinstance(layer, Quantized) and type(layer) is not kind:
        layer.__dict__[WRITTEN_AS] = type(layer)
    layer.__class__ = target
    device = device or next((t.device for t in layer.parameters()), None)
    for site in target.sites:
        quantizer = site_quantizers.get(site, nn.Identity())
        setattr(layer, attribute(site), quantizer.to(device) if device else quantizer)
    layer.configure(**options)


def _target(kind: type[nn.Module], compute: Mapping[str, Any] | None) -> tuple[type[Quantized], dict[str, Any]]:
    """Returns the class a float class becomes, and the options of its way to compute."""
    if compute:
        options = {k: v for k, v in compute.items() if k != "_target_"}
        family = locate(str(compute["_target_"])) if isinstance(compute["_target_"], str) else compute["_target_"]
        if not isinstance(family, Mapping):
            raise QexpError(
                f"compute: {compute['_target_']} is no family of layers (a mapping from float class to Quantized class)"
            )
        if kind in family:
            return family[kind], options
    if kind not in QUANTIZED:
        known = ", ".join(sorted(c.__name__ for c in QUANTIZED))
        raise QexpError(
            f"no quantized form of layer type {kind.__name__}; known are {known}. Add a class to qexp/layers/quantized.py"
        )
    return QUANTIZED[kind], {}


def _like_weight(quantizer: Quantizer) -> frozenset[str]:
    """Constants of a batch norm take whatever a weight or bias takes."""
    return frozenset({"running_mean", "running_var"}) if {"weight", "bias"} & quantizer.sites else frozenset()


def unswap(layer: Quantized) -> None:
    """Makes the layer float again, in place; its float weights are as they were."""
    for site in layer.sites:
        delattr(layer, attribute(site))
    for name in layer.learns:
        delattr(layer, name)
    for name in ("enabled", "learns"):
        layer.__dict__.pop(name, None)
    layer.__class__ = layer.__dict__.pop(WRITTEN_AS, layer.float_class)


def bake(layer: Quantized) -> None:
    """Makes the layer a plain float layer that holds its quantized constants, in place; activations are no longer quantized."""
    with torch.no_grad():
        for site in layer.sites:
            tensor = weight_of(layer, site)
            if tensor is not None:
                tensor.copy_(layer.site(site)(tensor))
    unswap(layer)


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as the float model it was made from."""
    layers = [layer for _, layer in quantized_layers(model)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


@contextmanager
def baked_weights(model: nn.Module) -> Iterator[None]:
    """Inside, each weight is quantized once and held, so that evaluation does not repeat it every batch; no gradients reach weights."""
    layers = [layer for _, layer in quantized_layers(model) if isinstance(layer, WEIGHTED)]
    with torch.no_grad():
        for layer in layers:
            hold_weight(layer, layer.weight_quantizer(layer.weight).detach())
    try:
        yield
    finally:
        for layer in layers:
            release_weight(layer)


def hold_weight(layer: Quantized, weight: Tensor) -> None:
    """Lets the layer compute with a weight that is quantized already, until `release_weight`; it is in no state and no file."""
    layer.register_buffer(BAKED, weight, persistent=False)


def release_weight(layer: Quantized) -> None:
    """Lets the layer quantize its own weight again; a layer that holds none is left as it is."""
    if BAKED in layer._buffers:
        delattr(layer, BAKED)


@torch.no_grad()
def check_all_ran(model: nn.Module, example: Tensor) -> None:
    """Raises, by name, for quantizers that an example `[N, C, H, W]` does not pass through: their layer is bypassed or dead."""
    ran: set[int] = set()
    everyone = list(quantizers(model))
    with (
        hooked(q.register_forward_pre_hook(lambda module, _: ran.add(id(module))) for _, _, q in everyone),
        evaluating(model),
    ):
        model(example)
    silent = [f"{name}.{site}" for name, site, q in everyone if id(q) not in ran]
    if silent:
        raise QexpError(
            f"{len(silent)} of {len(everyone)} quantizers never ran: {', '.join(silent[:6])}{' ...' if len(silent) > 6 else ''}. "
            "The model reads these tensors behind the layer's back (as attention modules do) or never calls the layer; "
            "leave these layers in float with a rule, or choose another model"
        )
