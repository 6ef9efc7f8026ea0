"""Moves exponents, layer by layer, if that brings the integer network's decisions and scores nearer to the float network's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.layers.swap import quantizers_off
from qexp.passes.base import Pass, PassContext
from qexp.passes.shared_exponents import residual_groups
from qexp.quantizers.caq import CAQShift
from qexp.results.judging import differing
from qexp.system.within import evaluating, hooked

log = logging.getLogger(__name__)


class RefineExponents(Pass):
    """Tries each layer's exponents one lower and one higher and keeps the better; layers with the largest error come first.

    A move is kept where the quantized network's scores are then nearer to the float one's (mean squared difference, on the calibration
    images) and it decides alike on no fewer of them; it is tried again from there, else undone and not tried again. Lower exponents let
    less saturate, higher ones have finer steps. The search ends when no more than `tolerance` points of agreement are missing, when no
    move is left, or after `max_iters`; if the task decides nothing per image, only distances count. The error that orders the
    layers is the norm-1 error of their codes, `100 sum|q - a/s| / sum|a/s|`, before a ReLU of what it lets through. Tensors that meet in an
    addition are one layer here, so that they keep sharing.

    Args:
        tolerance: Percentage points of agreement that may be missing.
        max_iters: Moves tried at most.
        layers_per_iter: Layers moved together.

    Source: the refinement loop of TF2-Engine's CNN Activation Quantization (its manual; there is no code of it).
    Differs from the source: it lowers a bound on the exponents of the worst layer in every round and keeps all of that, which gains
    nothing where nothing saturates; and it needs labels of test images, for which the float network's own answers to calibration
    images stand here.
    """

    def __init__(self, tolerance: float = 1.0, max_iters: int = 20, layers_per_iter: int = 1) -> None:
        if tolerance < 0 or max_iters < 0 or layers_per_iter < 1:
            raise QexpError(
                f"RefineExponents(tolerance={tolerance}, max_iters={max_iters}, layers_per_iter={layers_per_iter}): "
                "allowed are tolerance >= 0, max_iters >= 0, layers_per_iter >= 1"
            )
        self.tolerance, self.max_iters, self.layers_per_iter = tolerance, max_iters, layers_per_iter

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        with evaluating(model):
            layers = _layers(model, context)
            if layers:
                self._refine(model, layers, context)

    def _refine(self, model: nn.Module, layers: list[list[CAQShift]], context: PassContext) -> None:
        with quantizers_off(model):
            wanted = _scores(model, context.images)
        before_relu = _before_relu(model, context)
        errors, best = _errors(model, layers, context, wanted, before_relu)
        first, rounds, kept, spent = best, 0, 0, set()
        while rounds < self.max_iters and not best.agrees(self.tolerance):
            move = self._next(errors, spent)
            if move is None:
                break
            chosen, by = move
            rounds += 1
            _shift(layers, chosen, by)
            found, state = _errors(model, layers, context, wanted, before_relu)
            if state.better_than(best):
                errors, best, kept = found, state, kept + 1
                spent.discard((chosen, -by))
            else:
                _shift(layers, chosen, -by)
                spent.add((chosen, by))
            log.info(
                "refine exponents: round %d, %s %+d, %s, %s",
                rounds,
                layers[chosen[0]][0].name,
                by,
                state.words,
                "kept" if state is best else "undone",
            )
        context.findings |= {"refine_rounds": rounds, "refine_kept": kept}
        if best.agreed is not None:
            context.findings |= {"refine_agreement": best.agreed, "refine_gain": best.agreed - first.agreed}

    def _next(self, errors: list[float], spent: set[tuple[tuple[int, ...], int]]) -> tuple[tuple[int, ...], int] | None:
        """Returns the layers to move together, worst first, and the direction; skips failed moves, and is None if all failed."""
        order = sorted(range(len(errors)), key=lambda i: -errors[i])
        for start in range(0, len(order), self.layers_per_iter):
            chosen = tuple(sorted(order[start : start + self.layers_per_iter]))
            for by in (-1, 1):
                if (chosen, by) not in spent:
                    return chosen, by
        return None


@dataclass(frozen=True)
class State:
    """How near the quantized network is to the float one.

    Attributes:
        agreed: Share of images on which both decide alike, in percent; None if the task decides nothing per image.
        distance: Mean squared difference of their scores.
    """

    agreed: float | None
    distance: float

    def better_than(self, other: State) -> bool:
        """Whether the scores are nearer and no fewer decisions agree; decisions alone are too coarse on few images."""
        return self.distance < other.distance and (self.agreed is None or self.agreed >= other.agreed)

    def agrees(self, tolerance: float) -> bool:
        """Whether no more than so many percentage points of agreement are missing; never where there are no decisions."""
        return self.agreed is not None and self.agreed >= 100 - tolerance

    @property
    def words(self) -> str:
        """Returns the distance as text for the log."""
        return f"squared distance {self.distance:.4g}" if self.agreed is None else f"agreement {self.agreed:.2f} %"


def _shift(layers: list[list[CAQShift]], chosen: tuple[int, ...], by: int) -> None:
    for i in chosen:
        for q in layers[i]:
            q.set_exponents(q.exponents + by)


def _layers(model: nn.Module, context: PassContext) -> list[list[CAQShift]]:
    """Returns all exponent quantizers, those of a residual group together."""
    groups = residual_groups(model, context.facts)
    grouped = {id(q) for g in groups for q in g}
    single = {id(q): q for _, _, q in quantizers(model) if isinstance(q, CAQShift) and id(q) not in grouped}
    return groups + [[q] for q in single.values()]


def _before_relu(model: nn.Module, context: PassContext) -> set[int]:
    """Returns the ids of quantizers whose tensors all go straight into a ReLU."""
    carried = [
        (id(q), site == "output" and name in context.facts.followed_by_relu) for name, site, q in quantizers(model)
    ]
    return {q for q, before in carried if before} - {q for q, before in carried if not before}


def _scores(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in images])


def _errors(
    model: nn.Module, layers: list[list[CAQShift]], context: PassContext, wanted: Tensor, before_relu: set[int]
) -> tuple[list[float], State]:
    """Returns the norm-1 error of each layer's codes (the worst of a group), in percent, and the distance of the scores from `wanted`."""
    sums: dict[int, list[Tensor]] = {}

    def see(q: CAQShift, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        if id(q) in before_relu:
            x, y = x.relu(), y.relu()
        exact, error = (x / q.scale).abs().sum().double(), ((y - x) / q.scale).abs().sum().double()
        held = sums.get(id(q), [torch.zeros_like(exact), torch.zeros_like(exact)])
        sums[id(q)] = [held[0] + error, held[1] + exact]

    with hooked(q.register_forward_hook(see) for group in layers for q in group):
        scores = _scores(model, context.images)

    def percent(q: CAQShift) -> float:
        error, exact = sums[id(q)]
        return 100 * float(error / exact.clamp_min(1e-30))

    differ = differing(context.judge.decisions(scores), context.judge.decisions(wanted)) if context.judge else None
    agreed = None if differ is None else 100 * (len(scores) - differ) / len(scores)
    state = State(agreed, float((scores - wanted).double().square().mean()))
    return [max(percent(q) for q in group) for group in layers], state
