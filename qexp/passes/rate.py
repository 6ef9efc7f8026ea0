"""The size of a network's codes when they are stored with an ideal variable-length code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qexp.layers.quantized import quantizers, weight_of
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.base import Quantizer
from qexp.system.within import evaluating, hooked


def entropy(codes: Tensor) -> float:
    """Returns the entropy of codes in bits per value.

    >>> round(entropy(torch.tensor([0, 0, 1, 1, 2, 2, 2, 5])), 7)
    1.9056391
    """
    _, counts = codes.unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum())


class Rate(Pass):
    """Reports the mean entropy of the codes, weighted by elements: `rate_weight` and `rate_activation`, in bits per value.

    Activations are those of the first calibration batch in the quantized network. The rate of each tensor alone is in `layers.csv`.

    Args:
        per_channel: Code each channel by its own frequencies; otherwise one code per tensor.
    """

    def __init__(self, per_channel: bool = False) -> None:
        self.per_channel = per_channel

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Measures, in evaluation mode."""
        seen: dict[str, list[tuple[float, int]]] = {"weight": [], "activation": []}
        activations = []
        for name, site, q in quantizers(model):
            weight = weight_of(model.get_submodule(name), site)
            if weight is None:
                activations.append(q)
            elif site == "weight":
                self._see(seen["weight"], q, (weight,))
        see = partial(self._see, seen["activation"])
        with evaluating(model), hooked(q.register_forward_hook(see) for q in activations):
            model(context.images[0])
        for kind, found in seen.items():
            if found:
                context.findings[f"rate_{kind}"] = round(sum(h * n for h, n in found) / sum(n for _, n in found), 4)

    def _see(self, found: list[tuple[float, int]], q: Quantizer, args: tuple[Tensor, ...], _: Any = None) -> None:
        codes = q.codes(args[0])
        parts = q.granularity.rows(codes) if self.per_channel else [codes]
        found += [(entropy(part), part.numel()) for part in parts]
