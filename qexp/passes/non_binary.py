"""How many weights of a network with 1-bit weights are not 1-bit."""

from __future__ import annotations

import logging

from torch import nn

from qexp.layers.quantized import quantizers
from qexp.passes.base import Moment, Pass
from qexp.quantizers.hysteresis import Hysteresis

log = logging.getLogger(__name__)


class CountNonBinary(Pass):
    """Reports `non_binary_weights`, the weights of trained `Hysteresis` layers that are neither of their two levels.

    None with the rule `figure`; an accuracy reached with `legacy` means little without this number.
    """

    def on_trained(self, model: nn.Module, moment: Moment) -> None:
        remembered = [q for _, _, q in quantizers(model) if isinstance(q, Hysteresis)]
        count, total = sum(int(q.non_binary) for q in remembered), sum(q.state.numel() for q in remembered)
        moment.findings["non_binary_weights"] = count
        if count:
            log.warning("%d of %d weights are not 1-bit (hysteresis rule legacy): the network is not binary", count, total)
