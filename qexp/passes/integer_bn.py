"""Integer batch norms are told the steps of the tensors around them, and asked how wide their accumulators grew."""

from __future__ import annotations

from torch import nn

from qexp.layers.integer_bn import IntegerBatchNorm2d, Steps
from qexp.layers.quantized import float_class, quantized_layers
from qexp.network.facts import RELUS, Facts
from qexp.network.quantizer_before import arriving, at_output
from qexp.passes.base import Moment
from qexp.passes.integer_layers import IntegerLayers
from qexp.quantizers.base import Quantizer


class IntegerBatchNorms(IntegerLayers):
    """Links each integer batch norm to the convolution before it (or the tensor that comes in) and to the quantizer after it.

    Reports what `IntegerLayers` reports: `accumulator_bits`, `bn_constants_saturated`, `bn_factors_vanished`.
    """

    def on_statistics(self, model: nn.Module, moment: Moment) -> None:
        facts = moment.facts
        before = {bn: conv for conv, bn in facts.bn_of.items()}
        for name, layer in quantized_layers(model):
            if isinstance(layer, IntegerBatchNorm2d):
                conv = model.get_submodule(before[name]) if name in before else None
                source = arriving(model, facts, before.get(name, name))
                layer.take_steps(name, Steps(conv, source, _one_after(model, facts, name)))


def _one_after(model: nn.Module, facts: Facts, name: str) -> Quantizer | None:
    """Returns the quantizer that all of a batch norm's result passes next, None where there is none, or one with a zero point."""
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
    """Whether its values are its codes times one step: a uniform grid, no zero point."""
    return "half_step" in quantizer.properties and quantizer.symmetric and quantizer.granularity.axis is None
