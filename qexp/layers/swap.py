"""Turns a float layer into a quantized one by changing its class, in place, and turns it back.

Parameters, their names, hooks, tied modules and optimizers built earlier stay unchanged. Only the class changes, and quantizers are
added as submodules.
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

WRITTEN_AS = "_written_as"  # the layer's own class, where it is a subclass that only adds an `__init__`


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
        compute: The layer's computation, where it is not the ordinary one. `_target_` names a family: a mapping from float class to
            `Quantized` class. All other keys are options, passed to that class's `configure`.
        device: Device of the quantizers; None takes that of the layer's parameters. A layer without parameters has none.

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
    device = device or next(
        (t.device for t in (*layer.parameters(), *vars(layer).values()) if isinstance(t, Tensor)), None
    )
    for site in target.sites:
        quantizer = site_quantizers.get(site, nn.Identity())
        setattr(layer, attribute(site), quantizer.to(device) if device else quantizer)
    layer.configure(**options)


def _target(kind: type[nn.Module], compute: Mapping[str, Any] | None) -> tuple[type[Quantized], dict[str, Any]]:
    """Returns the quantized class for a float class, and the options of its computation."""
    if compute:
        options = {k: v for k, v in compute.items() if k != "_target_"}
        family = locate(str(compute["_target_"])) if isinstance(compute["_target_"], str) else compute["_target_"]
        if not isinstance(family, Mapping):
            raise QexpError(
                f"compute: {compute['_target_']} is not a family of layers (a mapping from float class to Quantized class)"
            )
        if kind in family:
            return family[kind], options
    if kind not in QUANTIZED:
        known = ", ".join(sorted({c.__name__ for c in QUANTIZED}))
        raise QexpError(
            f"no quantized form of layer type {kind.__name__}; known are {known}. Add a class to qexp/layers/quantized.py"
        )
    return QUANTIZED[kind], {}


def _like_weight(quantizer: Quantizer) -> frozenset[str]:
    """Returns the batch norm statistics if the quantizer is made for weights or biases, which it may then quantize too."""
    return frozenset({"running_mean", "running_var"}) if {"weight", "bias"} & quantizer.sites else frozenset()


def unswap(layer: Quantized) -> None:
    """Makes the layer float again, in place; its float weights are unchanged."""
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
    """Makes the model compute as the float model inside a `with` block."""
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
    """Quantizes each weight only once inside a `with` block, instead of once per batch; no gradients reach the weights."""
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
    """Makes the layer compute with an already quantized weight until `release_weight`; this weight is never saved."""
    layer.register_buffer(BAKED, weight, persistent=False)


def release_weight(layer: Quantized) -> None:
    """Makes the layer quantize its own weight again; does nothing for a layer without a held weight."""
    if BAKED in layer._buffers:
        delattr(layer, BAKED)


@torch.no_grad()
def check_all_ran(model: nn.Module, example: Tensor) -> None:
    """Raises an error that names the quantizers that do not run on an example `[N, C, H, W]`: their layer is bypassed or unused."""
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
            "The model reads these tensors without calling the layer (as attention modules do), or never uses the layer; "
            "leave these layers in float with a rule, or choose another model"
        )
