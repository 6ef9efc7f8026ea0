"""Links layers that compute on integers to the quantizers around them, because such a layer needs the scales of its tensors."""

from __future__ import annotations

from torch import nn

from qexp.layers.integer_bn import IntegerBatchNorm2d, Steps
from qexp.layers.quantized import float_class, quantized_layers
from qexp.network.facts import RELUS, Facts
from qexp.network.quantizer_before import arriving, at_output, leaving
from qexp.quantizers.base import Quantizer


def link(model: nn.Module, facts: Facts) -> None:
    """Links every layer that has a `link` method to the quantizers of its tensors, in place; repeat after replacing quantizers.

    A layer with `link(name, arriving, leaving)` receives the quantizers of its input and of its result. An integer batch norm receives
    the convolution before it (or the tensor that arrives) and the quantizer after it.

    Raises:
        QexpError: A layer that cannot compute between these quantizers, by name.
    """
    before = {bn: conv for conv, bn in facts.bn_of.items()}
    for name, layer in quantized_layers(model):
        if isinstance(layer, IntegerBatchNorm2d):
            conv = model.get_submodule(before[name]) if name in before else None
            source = arriving(model, facts, before.get(name, name))
            layer.take_steps(name, Steps(conv, source, _one_after(model, facts, name)))
        elif hasattr(layer, "link"):
            layer.link(name, arriving(model, facts, name), leaving(model, facts, name))


def _one_after(model: nn.Module, facts: Facts, name: str) -> Quantizer | None:
    """Returns the one quantizer after a batch norm's whole result; None where there is none, or where it has a zero point."""
    found = at_output(model, name)
    if found is None:
        ends = {
            arriving(model, facts, consumer, operand)
            for consumer in facts.consumers(name)
            for operand, names in enumerate(facts.sources[consumer])
            if name in names and not issubclass(float_class(model.get_submodule(consumer)), RELUS)
        }
        found = next(iter(ends)) if len(ends) == 1 else None
    return found if found is not None and _counts_from_zero(found) else None


def _counts_from_zero(quantizer: Quantizer) -> bool:
    """Returns whether the quantizer's values are its codes times one step: a uniform grid without zero point."""
    return "half_step" in quantizer.properties and quantizer.symmetric and quantizer.granularity.axis is None
