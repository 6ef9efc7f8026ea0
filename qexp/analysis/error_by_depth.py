"""Finds where the error of a quantized network arises: each layer's own error on float inputs, and the accumulated error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qexp.analysis.tensor_errors import Measures, measure, tensor_errors
from qexp.layers.quantized import main, quantized_layers, quantizers, weight_of
from qexp.layers.swap import evaluating, quantizers_off
from qexp.quantizers.base import Quantizer
from qexp.system.within import hooked

BUDGET = (
    256 * 2**20
)  # largest number of bytes of float results in memory; fewer images are used where they would need more


@torch.no_grad()
def errors_by_depth(
    model: nn.Module, images: Tensor, budget: int = BUDGET
) -> tuple[list[dict[str, Any]], Measures, Measures]:
    """Returns `{layer, local, total}` for each quantized layer, in order; each input's own error; and the result of `measure`.

    Both errors of a layer are the SQNR of its result in dB. `local` is the error that the layer itself makes on float inputs. `total` is
    the accumulated error: the result in the quantized network against the result in the float network (the same network with its
    quantizers off). None means no error, or no signal. An input's own error is `sqnr_float` and `saturation_float`: computed as in
    `measure`, but on float activations, because the activations of a collapsed network do not fit any calibrated range. `measure` runs
    on all images, and needs no extra pass where the budget allows all images.

    Args:
        model: Quantized and calibrated model.
        images: `[N, C, H, W]`.
        budget: Largest number of bytes of float results in memory; errors by depth use as many of the images as this allows.
    """
    kept: dict[str, list[Tensor]] = {}
    local: dict[str, Sums] = {}
    total: dict[str, Sums] = {}

    own: Measures = {}
    sites = [
        (q, (name, site)) for name, site, q in quantizers(model) if weight_of(model.get_submodule(name), site) is None
    ]

    def see(key: tuple[str, str]):
        def hook(quantizer: Quantizer, args: tuple[Tensor, ...], y: Tensor) -> None:
            found = tensor_errors(quantizer, args[0], y)
            own[key] = {"sqnr_float": found["sqnr"], "saturation_float": found["saturation"]}

        return hook

    def count(name: str, _: nn.Module, __: tuple, y: Tensor, ___: dict[str, Any]) -> None:
        kept.setdefault(name, []).append(y)

    def alone(name: str, layer: nn.Module, args: tuple, y: Tensor, named: dict[str, Any]) -> None:
        kept.setdefault(name, []).append(y.clone())  # a later layer may change it in place
        layer.enabled = True
        local.setdefault(name, Sums()).add(y, main(type(layer).forward(layer, *args, **named)))
        layer.enabled = False

    def together(name: str, _: nn.Module, __: tuple, y: Tensor, ___: dict[str, Any]) -> None:
        total.setdefault(name, Sums()).add(kept[name].pop(0), y)

    with evaluating(model):
        with quantizers_off(model), _hooked(model, count):
            model(images[:1])
        bytes_an_image = sum(y.numel() * y.element_size() for ys in kept.values() for y in ys)
        few = images[: max(1, min(len(images), budget // max(bytes_an_image, 1)))]
        kept.clear()
        watching = hooked(q.register_forward_hook(see(key)) for q, key in sites)
        with watching, quantizers_off(model), _hooked(model, alone):
            model(few)
        with _hooked(model, together):
            measured = measure(model, few)
        if len(few) < len(images):
            measured = measure(model, images)
    depth = [{"layer": name, "local": local[name].sqnr(), "total": total[name].sqnr()} for name in local]
    return depth, own, measured


@torch.no_grad()
def norm_drift(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Returns, for each batch norm in order of execution, the distance of its running statistics from those of its current input.

    Keys: `layer`; `shift`: mean over channels of `|mean - running_mean| / sqrt(running_var + eps)`; `spread`: the factor between the
    standard deviations, as a geometric mean over channels of the factor or its inverse, so 1 is no drift. Constant channels are skipped.
    While measuring, each batch norm uses batch statistics, so that the drift of earlier norms does not add up.
    """
    found: dict[str, dict[str, Any]] = {}
    norms = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        return []

    def hook(name: str):
        def see(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float().transpose(0, 1).flatten(1)
            expected = (norm.running_var + norm.eps).sqrt()
            alive = x.var(1, unbiased=False) > 0  # a channel that is constant after quantization is a different fault
            alive = alive if bool(alive.any()) else torch.ones_like(alive)
            ratio = ((x.var(1, unbiased=False) + norm.eps).sqrt() / expected)[alive]
            shift = ((x.mean(1) - norm.running_mean).abs() / expected)[alive]
            spread = ratio.log().abs().mean().exp()
            found.setdefault(name, {"layer": name, "shift": float(shift.mean()), "spread": float(spread)})

        return see

    before = [(m, m.momentum, m.num_batches_tracked.clone()) for _, m in norms]
    try:
        with evaluating(model), hooked(norm.register_forward_pre_hook(hook(name)) for name, norm in norms):
            for norm, _, _ in before:
                norm.training, norm.momentum = True, 0.0
            model(images)
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
    return list(found.values())


class Sums:
    """Adds up the power of a signal and of its error over the calls of a layer."""

    def __init__(self) -> None:
        self.power = self.error = 0.0

    def add(self, exact: Tensor, other: Tensor) -> None:
        """Adds the power of the exact tensor and of its difference to the other."""
        self.power += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        self.error += float(torch.linalg.vector_norm(exact - other, dtype=torch.float64)) ** 2

    def sqnr(self) -> float | None:
        """Returns the ratio in dB; None where there is no error or no signal."""
        return 10 * math.log10(self.power / self.error) if self.power > 0 and self.error > 0 else None


@contextmanager
def _hooked(model: nn.Module, see: Any) -> Iterator[None]:
    """Calls `see(name, layer, args, result, named arguments)` after each quantized layer inside a `with` block."""

    def hook(name: str):
        return lambda layer, args, named, y: see(name, layer, args, main(y), named)

    with hooked(layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in quantized_layers(model)):
        yield
