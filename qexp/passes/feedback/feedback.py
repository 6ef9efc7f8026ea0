"""The pass that visits the layers in order; a method chooses each layer's roundings from Gram matrices of its inputs."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qexp.errors import QexpError
from qexp.layers.swap import evaluating, quantizers_off
from qexp.passes.base import Pass, PassContext
from qexp.passes.feedback.grams import FORMS, Grams, columns, rows
from qexp.passes.reconstruction.capture import inputs
from qexp.passes.reconstruction.store import Store
from qexp.passes.reconstruction.units import Unit
from qexp.quantizers.learned_rounding import LearnedRounding

log = logging.getLogger(__name__)
_BATCH = 32  # images whose columns are held at one time


@dataclass(frozen=True)
class Problem:
    """The rows of one group of a layer, float64.

    Attributes:
        w: Float weights `[rows, n]`.
        floating, cross, quantized: Gram matrices `[n, n]` (see `Grams`).
        positions: Columns they sum.
        scale, zero_point: Of each weight, `[rows, n]`.
        low, high: Least and greatest code.
    """

    w: Tensor
    floating: Tensor
    cross: Tensor
    quantized: Tensor
    positions: int
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def quantize(self, column: Tensor, place: int) -> Tensor:
        """Returns the levels nearest to values `[rows]` at one place of the filters; ties to the even code."""
        scale, zero = self.scale[:, place], self.zero_point[:, place]
        codes = torch.round(column / scale + zero)
        return (torch.minimum(torch.maximum(codes, self.low[:, place]), self.high[:, place]) - zero) * scale


class Feedback(Pass):
    """Chooses the roundings of each layer with a `LearnedRounding` weight, in order of execution; a method implements `solve`.

    The inputs of a layer come from the float network and from the network with earlier layers rounded and activations quantized. Layers
    that run more than once, and those that are neither `Conv2d` nor `Linear`, keep their nearest roundings.

    Args:
        positions: Largest number of output positions per batch of images; None takes all.
        memory_mb: Limit of the activations kept in memory at one time, in MiB; the rest goes to a file in the run's folder.
    """

    def __init__(self, positions: int | None, memory_mb: float) -> None:
        self.choose(positions=(positions, positions is None or positions >= 1, "1 and more, or null"))
        self.choose(memory_mb=(memory_mb, memory_mb >= 0, "0 (all in a file) and more"))
        self.positions, self.memory_mb = positions, memory_mb

    def choose(self, **checked: tuple[Any, bool, str]) -> None:
        """Raises if an option is not allowed; each option is given as value, whether it is allowed, and what is allowed."""
        for name, (value, good, allowed) in checked.items():
            if not good:
                raise QexpError(f"{type(self).__name__}: {name}={value!r} is not allowed; use {allowed}")

    def solve(self, problem: Problem) -> Tensor:
        """Returns the quantized values `[rows, n]` of one group's weights."""
        raise NotImplementedError

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Rounds; reports the layers' mean relative error with nearest and with chosen roundings, and the number of changed codes."""
        started = time.perf_counter()
        chosen = [n for n in context.facts.order if _learns(model.get_submodule(n))]
        if not chosen:
            raise QexpError(
                f"{type(self).__name__} found no weight with a LearnedRounding quantizer; choose quant=gptq, gpfq or qronos, or give the "
                "recipe weight._target_: qexp.quantizers.learned_rounding.LearnedRounding"
            )
        able = [n for n in chosen if self._able(model, context, n)]
        home = next(model.parameters()).device
        errors: list[tuple[float, float]] = []
        with evaluating(model), torch.no_grad():
            model.to(context.device or home)
            try:
                for name in tqdm(
                    able, desc=type(self).__name__, unit="layer", leave=False, disable=not context.progress
                ):
                    errors.append(self._round(model, context, name))
            finally:
                model.to(home)
        quantizers = [model.get_submodule(n).weight_quantizer for n in able]
        weights = sum(q.shift.numel() for q in quantizers if q.shift is not None)
        nearest, after = (sum(e[i] for e in errors) / max(len(errors), 1) for i in (0, 1))
        log.info("%s: mean relative error of %d layers %.4g -> %.4g", type(self).__name__, len(able), nearest, after)
        context.findings |= {
            "rounded_layers": len(able),
            "roundings_moved": round(100 * sum(q.moved for q in quantizers) / max(weights, 1), 3),
            "layer_error_nearest": round(nearest, 6),
            "layer_error": round(after, 6),
            "feedback_seconds": round(time.perf_counter() - started, 1),
        }

    def _able(self, model: nn.Module, context: PassContext, name: str) -> bool:
        layer, calls = model.get_submodule(name), len(context.facts.every_call.get(name, ((),)))
        why = "" if isinstance(layer, FORMS) else f"it is a {type(layer).__name__}"
        why = why or ("" if calls == 1 else f"it runs {calls} times")
        if why:
            log.info("%s: layer %s keeps its nearest roundings (%s)", type(self).__name__, name, why)
        return not why

    def _round(self, model: nn.Module, context: PassContext, name: str) -> tuple[float, float]:
        """Rounds one layer; returns its relative error with the nearest and with the chosen roundings."""
        layer = model.get_submodule(name)
        grams, quantizer = self._grams(model, context, name), layer.weight_quantizer
        w = rows(layer, layer.weight.double())
        nearest = rows(layer, quantizer(layer.weight).double())
        scale, zero = (rows(layer, _like(layer.weight, quantizer, t)) for t in (quantizer.scale, quantizer.zero_point))
        low, high = (rows(layer, _like(layer.weight, quantizer, torch.as_tensor(t))) for t in quantizer.limits)
        found = torch.stack(
            [
                self.solve(
                    Problem(
                        w[g], grams.floating[g], grams.cross[g], grams.quantized[g], grams.positions,
                        scale[g], zero[g], low[g], high[g],
                    )
                )
                for g in range(len(w))
            ]
        )  # fmt: skip
        before, after = grams.error(w, nearest), grams.error(w, found)
        if after < before:
            codes = torch.round(found / scale + zero).reshape(layer.weight.shape)
            quantizer.adopt(layer.weight.detach(), codes)
        kept = "" if after < before else "; not better than the nearest roundings, which stay"
        log.info("%s %s: relative error %.4g -> %.4g%s", type(self).__name__, name, before, after, kept)
        return before, min(before, after)

    def _grams(self, model: nn.Module, context: PassContext, name: str) -> Grams:
        """Returns the Gram matrices of a layer's inputs over the calibration images."""
        layer, unit = model.get_submodule(name), Unit(name, (name,))
        device = layer.weight.device
        store = Store(self.memory_mb, context.folder, device)
        seen = inputs(model, unit, context.images, store)
        with quantizers_off(model):
            floating = inputs(model, unit, context.images, store)
        grams = Grams.empty(layer)
        generator = torch.Generator(device).manual_seed(context.seed)
        for start in range(0, len(seen), _BATCH):
            part = slice(start, start + _BATCH)
            x = columns(layer, floating[part].to(device))
            y = columns(layer, layer.input_quantizer(seen[part].to(device)))
            if self.positions is not None and self.positions < x.shape[-1]:
                some = torch.randperm(x.shape[-1], generator=generator, device=device)[: self.positions]
                x, y = x[..., some], y[..., some]
            grams.add(x, y)
        return grams


def _learns(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight_quantizer", None), LearnedRounding)


def _like(weight: Tensor, quantizer: LearnedRounding, value: Tensor) -> Tensor:
    """Returns a scale, zero point or limit for each weight, float64, in the weight's shape."""
    value = value.to(device=weight.device, dtype=torch.float64)
    groups, _ = quantizer.rows(weight)
    if value.numel() == 1:
        return value.reshape(1).expand(weight.numel()).reshape(weight.shape)
    return value.expand(groups.shape).reshape(weight.shape)
