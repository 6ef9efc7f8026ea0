"""Which quantizer a tensor has passed when it arrives at a layer: the layer's own, or that of the layer it comes from."""

from __future__ import annotations

from torch import nn

from qexp.graph import Facts
from qexp.layers.quantized import Quantized
from qexp.quantizers.base import Quantizer


def arriving(model: nn.Module, facts: Facts, layer: str, operand: int = 0) -> Quantizer | None:
    """Returns the quantizer of a layer's input, None where it comes as a float.

    Args:
        model: Network with its quantizers attached.
        facts: Its structure.
        layer: Name of the layer.
        operand: Which input, of several.
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
