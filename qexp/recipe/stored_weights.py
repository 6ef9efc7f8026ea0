"""Replaces float weights by their quantized values, so that they can be stored as codes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from qexp.layers.quantized import WEIGHTED, Quantized, quantized_layers
from qexp.quantizers.base import Quantizer
from qexp.quantizers.learned_rounding import LearnedRounding
from qexp.quantizers.stored import Stored
from qexp.recipe.plan import Entry, Plan

STORED = f"{Stored.__module__}.{Stored.__qualname__}"


@torch.no_grad()
def store_weights(model: nn.Module, plan: Plan) -> tuple[Plan, dict[str, Tensor | None]]:
    """Gives each quantized layer, in place, a weight that lies on its levels already, and a quantizer that leaves it there.

    The layer keeps its method where that returns its own result unchanged (learned roundings without their shifts, which have been
    made); else it gets `Stored`.

    Returns:
        The plan of these quantizers; and by the name of each such weight the step it may be a multiple of.
    """
    made: dict[str, tuple[Quantized, Tensor, Quantizer]] = {}
    for name, layer in quantized_layers(model):
        quantizer = getattr(layer, "weight_quantizer", None)
        if isinstance(layer, WEIGHTED) and isinstance(quantizer, Quantizer):
            value = quantizer(layer.weight).detach().clone()
            made[name] = (layer, value, _kept(quantizer, value) or _stored(quantizer, value, layer.weight))
    entries: list[Entry] = []
    for entry in plan:
        if entry.site == "weight" and entry.layer in made and type(made[entry.layer][2]) is Stored:
            spec = {"_target_": STORED, "granularity": str(made[entry.layer][2].granularity)}
            entry = replace(entry, spec=spec)
        entries.append(entry)
    steps: dict[str, Tensor | None] = {}
    for name, (layer, value, quantizer) in made.items():
        steps[f"{name}.weight"] = _step(layer.weight_quantizer, len(value))
        layer.weight.copy_(value)
        layer.weight_quantizer = quantizer
    return Plan(tuple(entries)), steps


def _kept(quantizer: Quantizer, value: Tensor) -> Quantizer | None:
    """Returns the quantizer for a tensor that it has quantized; None where it would quantize that otherwise."""
    found = copy.deepcopy(quantizer)
    if isinstance(found, LearnedRounding):
        found.shift = None
    return found if torch.equal(found(value), value) else None


def _stored(quantizer: Quantizer, value: Tensor, weight: Tensor) -> Stored:
    granularity = quantizer.granularity if quantizer.granularity.axis == 0 else None
    found = Stored(quantizer.bits, tuple(value.shape), granularity=granularity)
    found.name = quantizer.name
    found.adopt(value, quantizer, quantizer.codes(weight))
    found.mark_ready()
    return found


def _step(quantizer: Quantizer, rows: int) -> Tensor | None:
    """Returns the scale of a weight's quantizer, where there is one for all weights or one for each row."""
    scale = getattr(quantizer, "scale", None)
    fits = scale is not None and quantizer.gain is None and scale.numel() in (1, rows)
    return scale.detach().flatten() if fits and quantizer.granularity.axis in (None, 0) else None
