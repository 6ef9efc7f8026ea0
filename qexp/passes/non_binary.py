"""Counts the weights of a 1-bit network that are not 1-bit."""

from __future__ import annotations

import logging

from torch import nn

from qexp.layers.quantized import quantizers
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.hysteresis import Hysteresis

log = logging.getLogger(__name__)


class CountNonBinary(Pass):
    """Reports `non_binary_weights`, the weights of trained `Hysteresis` layers that are neither of their two levels.

    And `non_binary_weights_most`, the sum over layers of the most at any step of the training: a schedule that ends at a small rate may
    hide them. None with the rule `figure`; an accuracy reached with `legacy` means little without these numbers.
    """

    def on_trained(self, model: nn.Module, context: PassContext) -> None:
        remembered = [q for _, _, q in quantizers(model) if isinstance(q, Hysteresis)]
        count, total = sum(int(q.non_binary) for q in remembered), sum(q.state.numel() for q in remembered)
        most = sum(int(q.most_non_binary) for q in remembered)
        context.findings |= {"non_binary_weights": count, "non_binary_weights_most": most}
        if most:
            log.warning(
                "hysteresis rule legacy: %d of %d weights are not 1-bit, up to %d were while it trained",
                count,
                total,
                most,
            )
