"""Evaluates a simulated network's convolutions and linear layers on integer codes, with the processor's 8-bit dot products.

The simulation multiplies real values that lie on grids. Their sums round in float32, in an order that the library chooses. On codes the
same sums are exact integers, and scales and bias are applied once after. A result so differs from the simulation's only by the rounding
of float32, and a code behind it only where that rounding crosses the border between two codes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from qexp_kernels import compiled
from torch import Tensor, nn

from qexp.integer.code_layer import CodeLayer, Refused
from qexp.integer.code_passes import one_pass
from qexp.layers.quantized import float_class
from qexp.network.recorder import record
from qexp.system.within import evaluating, hooked

log = logging.getLogger(__name__)
_SHOWN = 6  # names in a message


@dataclass
class OnCodes:
    """What is evaluated on codes.

    Attributes:
        layers: Layers whose products are computed on codes.
        others: Why each other convolution and linear layer is not, by name.
        share: Share of the products of an image that are computed on codes.
        passes: Modules whose results become codes of the next layers in the same pass.
    """

    layers: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    share: float = 0.0
    passes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Returns one line for people."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.others.items():
            reasons.setdefault(why, []).append(name)
        rest = "; ".join(
            f"{', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}: {why}"
            for why, names in reasons.items()
        )
        return f"{100 * self.share:.1f} % of the products on codes" + (f"; in floating point {rest}" if rest else "")


@contextmanager
def on_codes(model: nn.Module, example: Tensor) -> Iterator[OnCodes]:
    """Evaluates layers on codes inside a `with` block where that is exact; the others stay as they are.

    The model must be in evaluation mode for its results to be those of this block; its quantizers must be calibrated.

    Args:
        model: The quantized network.
        example: An image `[1, C, H, W]`, for the share of products.
    """
    found, layers = OnCodes(), {}
    for name, layer in model.named_modules():
        if not issubclass(float_class(layer), nn.Conv2d | nn.Linear):
            if isinstance(layer, nn.Conv1d | nn.Conv3d | nn.ConvTranspose2d):
                found.others[name] = f"{float_class(layer).__name__} has no dot products on codes"
            continue
        try:
            layers[name] = CodeLayer(layer)
        except Refused as reason:
            found.others[name] = str(reason)
    found.layers = list(layers)
    recorded = record(model, example).graph if layers and compiled("fused_conv") else None
    try:
        for layer in layers.values():
            layer.layer.forward = layer.run
        with one_pass(recorded.steps if recorded else [], model, layers) as found.passes:
            found.share = _share(model, example, set(layers))
            yield found
    finally:
        for layer in layers.values():
            vars(layer.layer).pop("forward", None)


@torch.no_grad()
def _share(model: nn.Module, example: Tensor, chosen: set[str]) -> float:
    """Returns the share of an image's products that the chosen layers compute."""
    counts = {True: 0, False: 0}

    def count(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, given: tuple, result: Tensor) -> None:
            per = (
                module.weight[0].numel()
                if not isinstance(module, nn.ConvTranspose2d)
                else module.weight.numel() // module.in_channels
            )
            counts[name in chosen] += result[0].numel() * per

        return hook

    weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, weighted)]
    with hooked(layer.register_forward_hook(count(name)) for name, layer in layers), evaluating(model):
        model(example[:1])
    return counts[True] / max(sum(counts.values()), 1)
