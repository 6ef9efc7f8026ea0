"""Reports on layers that compute on integers: overflows, accumulator widths, saturated constants."""

from __future__ import annotations

import logging

import torch
from torch import nn

from qexp.layers.quantized import quantized_layers
from qexp.passes.base import Pass, PassContext
from qexp.system.within import evaluating

log = logging.getLogger(__name__)
_GREATEST = ("accumulator_bits",)  # findings that are not summed over layers


class IntegerLayers(Pass):
    """Reports overflows, negative shifts, accumulator widths, and constants of integer batch norms that saturated or vanished.

    The network runs once, on the first calibration batch. A layer reports if it has `account() -> {name: number}`. Findings are summed
    over layers (widths: the greatest); the log has a line for each layer that reports more than 0.
    """

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        with evaluating(model):
            model(context.images[0])
        for name, layer in quantized_layers(model):
            for what, number in layer.account().items() if hasattr(layer, "account") else ():
                held = context.findings.get(what, 0)
                context.findings[what] = max(held, number) if what in _GREATEST else held + number
                if number:
                    log.info("%s: %s %d", name, what, number)
        overflows = {k: v for k, v in context.findings.items() if k.endswith("overflows") and v}
        if overflows:
            log.warning("16 bits do not hold all results, so values saturate: %s (first calibration batch)", overflows)
