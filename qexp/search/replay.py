"""Replays a network: layers before a change return their kept results instead of computing them again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.network.facts import Facts
from qexp.system.within import hooked


class Replay:
    """Runs a model on one batch again and again, with a change in one layer, at the cost of the layers from there on.

    The first run keeps the result of every layer that can carry quantizers. Later runs call the model as usual, but the layers before the
    changed one return their kept results; only modules between them (ReLUs, adds, pools) compute again.

    Memory: the results of all layers for one batch, see `bytes_an_image`.

    Args:
        model: In evaluation mode.
        facts: Facts of the model's graph; if a layer runs several times per image, every run computes all layers.
    """

    def __init__(self, model: nn.Module, facts: Facts) -> None:
        self.model = model
        running = {name for name, _ in model.named_modules()}  # without calls of functions that carry no quantizer
        self.order = {name: i for i, name in enumerate(n for n in facts.order if n in running)}
        self._kept: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    @torch.no_grad()
    def first(self, images: Tensor) -> Tensor:
        """Returns the model's result for `[N, C, H, W]`, and keeps every layer's."""
        self._kept, self._calls = {}, {}

        def keep(name: str):
            def hook(_, __, output):
                self._calls[name] = self._calls.get(name, 0) + 1
                self._kept[name] = output

            return hook

        watching = hooked(self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self.order)
        with watching, _nothing_in_place(self.model):
            return self.model(images)

    @torch.no_grad()
    def again(self, images: Tensor, changed: str) -> Tensor:
        """Returns the model's result for the same images, computing again only from the layer `changed` on."""
        if any(calls > 1 for calls in self._calls.values()):
            return self.model(images)
        skipped = [self.model.get_submodule(n) for n, i in self.order.items() if i < self.order[changed]]
        kept = [self._kept[n] for n, i in self.order.items() if i < self.order[changed]]
        for layer, output in zip(skipped, kept):
            layer.forward = lambda *_, output=output: output
        try:
            with _nothing_in_place(self.model):
                return self.model(images)
        finally:
            for layer in skipped:
                del layer.forward


def bytes_an_image(facts: Facts) -> int:
    """Returns the bytes that a replay keeps per image: the float32 results of all layers."""
    total = 0
    for sites in facts.shapes.values():
        shape = sites.get("output", (1,))
        total += 4 * math.prod(shape) // facts.images
    return total


@contextmanager
def _nothing_in_place(model: nn.Module) -> Iterator[None]:
    """Context manager: activations do not overwrite their input, since a kept result must not change."""
    changed = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    for module in changed:
        module.inplace = False
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True
