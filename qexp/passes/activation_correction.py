"""Activation correction: restores the mean of each channel of a quantized output in every batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.base import Quantizer


def restore_mean(x: Tensor, quantized: Tensor) -> Tensor:
    """Returns `quantized` with each channel's mean moved to that of `relu(x)`; only positive values change. Both `[N, C, ...]`.

    `d_c = (sum relu(x) - sum x_q) / (#{x > 0} + 1e-8)`, over the batch.

    Source: the activation bias correction of cnn-quantization.
    """
    over = [d for d in range(x.ndim) if d != 1]
    lack = (x.relu() - quantized).sum(over, keepdim=True) / ((x > 0).sum(over, keepdim=True) + 1e-8)
    return torch.where(quantized > 0, quantized + lack, quantized)


class _Restore:
    """A hook on a quantizer; a class of its own so that the model can be copied and saved."""

    def __call__(self, quantizer: Quantizer, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return restore_mean(args[0], y)


class ActivationCorrection(Pass):
    """Restores the mean of every quantized output that a ReLU follows, in each batch.

    This is an analysis and not a method for hardware: it needs the float result at inference. The record therefore holds
    `not_mappable`. The codes do not change.

    Source: the option of cnn-quantization.
    """

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Hooks the outputs; raises if there is none."""
        found = [
            q for name, site, q in quantizers(model) if site == "output" and name in context.facts.followed_by_relu
        ]
        if not found:
            raise QexpError(
                "activation_correction: no quantized output is followed by a ReLU (quant=aciq_full has some)"
            )
        for q in found:
            q.register_forward_hook(_Restore())
        context.findings |= {"corrected_outputs": len(found), "hardware": "not_mappable: activation_correction"}
