"""Exponents lowered, layer by layer, until the integer network decides as the float network does."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.layers.swap import quantizers_off
from qexp.passes.base import Moment, Pass
from qexp.passes.shared_exponents import residual_groups
from qexp.quantizers.caq import CAQShift

log = logging.getLogger(__name__)


class RefineExponents(Pass):
    """While accuracy is short, lowers by one the bound on the exponents of the layers whose codes err most, and keeps the best state.

    Accuracy is the share of calibration images on which the quantized network decides as the float one; the loop ends when no more than
    `tolerance` points are missing. The error is the norm-1 error of the codes, `100 sum|q - a/s| / sum|a/s|`, before a ReLU of what it lets
    through. The bound of a layer starts at the floor of the mean exponent of its channels that have a say (`zero_channels` of `CAQShift`).
    Tensors that meet in an addition are one layer here, so that they keep sharing.

    Args:
        tolerance: Percentage points that may be missing.
        max_iters: Rounds at most.
        layers_per_iter: Layers lowered in one round.

    Source: the refinement loop of TF2-Engine's CNN Activation Quantization.
    Differs from the source: it needs labels of test images; here the float network's own answers to calibration images stand for them.
    """

    def __init__(self, tolerance: float = 1.0, max_iters: int = 20, layers_per_iter: int = 1) -> None:
        if tolerance < 0 or max_iters < 0 or layers_per_iter < 1:
            raise QexpError(
                f"RefineExponents(tolerance={tolerance}, max_iters={max_iters}, layers_per_iter={layers_per_iter}): "
                "allowed are tolerance >= 0, max_iters >= 0, layers_per_iter >= 1"
            )
        self.tolerance, self.max_iters, self.layers_per_iter = tolerance, max_iters, layers_per_iter

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, moment: Moment) -> None:
        training = model.training
        model.eval()
        layers = _layers(model, moment)
        if layers:
            self._refine(model, layers, moment)
        model.train(training)

    def _refine(self, model: nn.Module, layers: list[list[CAQShift]], moment: Moment) -> None:
        with quantizers_off(model):
            wanted = _decisions(model, moment.images)
        bounds = [_start(group[0]) for group in layers]
        before_relu = _before_relu(model, moment)
        best, best_state, rounds = -1.0, None, 0
        for rounds in range(self.max_iters + 1):
            errors, agreed = _errors(model, layers, moment.images, wanted, before_relu)
            log.info(
                "refine exponents: round %d, agreement %.2f %%, worst layer %s", rounds, agreed, _worst(layers, errors)
            )
            if agreed > best:
                best, best_state = agreed, [[q.exponents.clone() for q in group] for group in layers]
            if agreed >= 100 - self.tolerance or rounds == self.max_iters:
                break
            for i in sorted(range(len(layers)), key=lambda i: -errors[i])[: self.layers_per_iter]:
                bounds[i] -= 1
                for q in layers[i]:
                    q.set_exponents(q.exponents.clamp_max(int(bounds[i])))
        for group, state in zip(layers, best_state or []):
            for q, exponents in zip(group, state):
                q.set_exponents(exponents)
        moment.findings["refine_rounds"], moment.findings["refine_agreement"] = rounds, best


def _layers(model: nn.Module, moment: Moment) -> list[list[CAQShift]]:
    """Returns all exponent quantizers, those of a residual group together."""
    groups = residual_groups(model, moment.facts)
    grouped = {id(q) for g in groups for q in g}
    single = {id(q): q for _, _, q in quantizers(model) if isinstance(q, CAQShift) and id(q) not in grouped}
    return groups + [[q] for q in single.values()]


def _start(q: CAQShift) -> float:
    """Returns the floor of the mean exponent of the channels that have a say, of all where none has."""
    counted = q.counted.to(q.scale.device)
    return float(q.exponents[counted if bool(counted.any()) else ~counted].float().mean().floor())


def _before_relu(model: nn.Module, moment: Moment) -> set[int]:
    """Returns the ids of quantizers whose tensors all go straight into a ReLU."""
    carried = [
        (id(q), site == "output" and name in moment.facts.followed_by_relu) for name, site, q in quantizers(model)
    ]
    return {q for q, before in carried if before} - {q for q, before in carried if not before}


def _decisions(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images])


def _errors(
    model: nn.Module, layers: list[list[CAQShift]], images: Sequence[Tensor], wanted: Tensor, before_relu: set[int]
) -> tuple[list[float], float]:
    """Returns the norm-1 error of each layer's codes (the worst of a group) and the agreement with `wanted`, both in percent."""
    sums: dict[int, list[Tensor]] = {}

    def see(q: CAQShift, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        if id(q) in before_relu:
            x, y = x.relu(), y.relu()
        exact, error = (x / q.scale).abs().sum().double(), ((y - x) / q.scale).abs().sum().double()
        held = sums.get(id(q), [torch.zeros_like(exact), torch.zeros_like(exact)])
        sums[id(q)] = [held[0] + error, held[1] + exact]

    handles = [q.register_forward_hook(see) for group in layers for q in group]
    try:
        agreed = 100 * float((_decisions(model, images) == wanted).double().mean())
    finally:
        for handle in handles:
            handle.remove()

    def percent(q: CAQShift) -> float:
        error, exact = sums[id(q)]
        return 100 * float(error / exact.clamp_min(1e-30))

    return [max(percent(q) for q in group) for group in layers], agreed


def _worst(layers: list[list[CAQShift]], errors: list[float]) -> str:
    i = max(range(len(layers)), key=errors.__getitem__)
    return f"{layers[i][0].name} ({errors[i]:.2f} %)"
