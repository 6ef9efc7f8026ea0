"""Finds the quantizer of a tensor that arrives at a layer: the layer's own, or that of the layer before it."""

from __future__ import annotations

from torch import nn

from qexp.layers.quantized import Quantized
from qexp.network.facts import Facts
from qexp.quantizers.base import Quantizer


def arriving(model: nn.Module, facts: Facts, layer: str, operand: int = 0) -> Quantizer | None:
    """Returns the quantizer of a layer's input; None where the input is a float tensor.

    Args:
        model: Network with its quantizers attached.
        facts: Structure of the network.
        layer: Name of the layer.
        operand: Index of the input, where the layer has several.
    """
    module = model.get_submodule(layer)
    if isinstance(module, Quantized):
        site = "input" if "input" in module.sites else f"input.{operand}"
        own = module.site(site) if site in module.sites else None
        if isinstance(own, Quantizer):
            return own
    operands = facts.sources.get(layer, ())
    for name in operands[operand] if operand < len(operands) else ():
        leaving = at_output(model, name)
        if leaving is not None:
            return leaving
    return None


def at_output(model: nn.Module, layer: str) -> Quantizer | None:
    """Returns the quantizer on a layer's output, None where there is none."""
    module = model.get_submodule(layer)
    own = module.site("output") if isinstance(module, Quantized) and "output" in module.sites else None
    return own if isinstance(own, Quantizer) else None


def leaving(model: nn.Module, facts: Facts, layer: str) -> Quantizer | None:
    """Returns the first quantizer after a layer: on its own output, after the batch norm that follows, or on a consumer's input."""
    own = at_output(model, layer)
    if own is not None:
        return own
    after = facts.consumers(layer)
    norms = [c for c in after if isinstance(model.get_submodule(c), nn.modules.batchnorm._BatchNorm)]
    for name in norms:
        found = leaving(model, facts, name)
        if found is not None:
            return found
    for name in after:
        for operand, names in enumerate(facts.sources[name]):
            found = arriving(model, facts, name, operand) if layer in names else None
            if found is not None:
                return found
    return None
