"""Records the inputs and outputs of a unit while the network runs up to that unit, float or quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import attribute, quantized_layers, quantizers, weight_of
from qexp.layers.swap import baked_weights, quantizers_off
from qexp.network.facts import Facts
from qexp.passes.reconstruction.store import Samples, Store
from qexp.passes.reconstruction.units import Unit
from qexp.quantizers.base import Quantizer
from qexp.system.within import hooked


class _Seen(Exception):
    """Raised to end a forward pass once the unit has run."""


@contextmanager
def activations_off(model: nn.Module) -> Iterator[None]:
    """Context manager: weights are quantized and activations are not."""
    held = [
        (model.get_submodule(n), s, q) for n, s, q in quantizers(model) if weight_of(model.get_submodule(n), s) is None
    ]
    for layer, site, _ in held:
        setattr(layer, attribute(site), nn.Identity())
    try:
        yield
    finally:
        for layer, site, quantizer in held:
            setattr(layer, attribute(site), quantizer)


@torch.no_grad()
def inputs(model: nn.Module, unit: Unit, images: Sequence[Tensor], store: Store) -> Samples:
    """Returns the unit's inputs for all images, with the network in its current state."""

    def see(_, args: tuple[Tensor, ...]) -> None:
        raise _Seen(args[0])

    with hooked([model.get_submodule(unit.modules[0]).register_forward_pre_hook(see)]):
        return _collect(model, images, store)


@torch.no_grad()
def targets(model: nn.Module, unit: Unit, images: Sequence[Tensor], store: Store) -> Samples:
    """Returns the float network's result after the unit and its activation, for all images."""

    def see(_, __, y: Tensor) -> None:
        raise _Seen(y if unit.activation is None else unit.activation(y))

    with quantizers_off(model), hooked([model.get_submodule(unit.name).register_forward_hook(see)]):
        return _collect(model, images, store)


def _collect(model: nn.Module, images: Sequence[Tensor], store: Store) -> Samples:
    """Returns what a hook on the model has seen of all images."""
    device = next(model.parameters()).device
    found: Samples | None = None
    with baked_weights(model):
        for batch in images:
            try:
                model(batch.to(device))
            except _Seen as seen:
                x = seen.args[0]
                found = store.room(sum(map(len, images)), x) if found is None else found
                found.add(x)
    return found


@contextmanager
def _float_after(model: nn.Module, facts: Facts, last: str) -> Iterator[None]:
    """Context manager: the layers that run after `last` are float."""
    ran = set(facts.order[: facts.order.index(last) + 1])
    later = [layer for name, layer in quantized_layers(model) if name not in ran]
    before = [layer.enabled for layer in later]
    for layer in later:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(later, before):
            layer.enabled = enabled


def importance(model: nn.Module, facts: Facts, unit: Unit, images: Sequence[Tensor], store: Store) -> Samples:
    """Returns a weight for each value of the unit's output, 1 on average over each sample: `(1 + g^2 / mean(g^2)) / 2`.

    g is the gradient, at that value, of the divergence of the float network's class probabilities from those of the network quantized up to
    and with the unit, so no labels are needed.

    Source: Li et al. 2021 (arXiv 2102.05426), equation 10, with the loss of their code.
    Differs from the source: the mean is that of the sample, and half of the weight is spread evenly (their code adds 1 to |g|). Without
    this, a tenth of the images, those near a class boundary, hold 99 % of the weight in early blocks, and the others are not reconstructed.
    """
    device = next(model.parameters()).device
    last = max((n for n in facts.order if n == unit.name or n.startswith(unit.name + ".")), key=facts.order.index)
    cut: list[Tensor] = []

    def see(_, __, y: Tensor) -> Tensor:
        cut.append(y.detach().requires_grad_())
        return cut[-1].clone()  # a ReLU may work in place

    found: Samples | None = None
    for batch in images:
        batch = batch.to(device)
        with torch.no_grad(), quantizers_off(model):
            wanted = model(batch)
        if not isinstance(wanted, Tensor) or wanted.ndim != 2:
            raise QexpError("loss=fisher_diag needs a network that returns class scores [N, K]; use loss=mse")
        cut.clear()
        watching = hooked([model.get_submodule(unit.name).register_forward_hook(see)])
        with watching, torch.enable_grad(), _float_after(model, facts, last):
            scores = model(batch)
            differ = scores.detach().softmax(1) - wanted.softmax(1)  # the divergence's gradient to the scores
            (gradient,) = torch.autograd.grad(scores, cut[0], differ)
        found = store.room(sum(map(len, images)), gradient) if found is None else found
        squares = gradient.square()
        mean = squares.flatten(1).mean(1).reshape(-1, *[1] * (squares.ndim - 1))
        found.add(torch.where(mean > 0, (1 + squares / mean) / 2, 1.0))  # 1 where the networks agree to the last bit
    return found


def activation_quantizers(model: nn.Module, unit: Unit) -> list[Quantizer]:
    """Returns the quantizers on activations inside a unit, each once."""
    modules = [model.get_submodule(name) for name in unit.modules]
    inside = [(m.get_submodule(name), site, q) for m in modules for name, site, q in quantizers(m)]
    found = [q for layer, site, q in inside if weight_of(layer, site) is None]
    return list({id(q): q for q in found}.values())
