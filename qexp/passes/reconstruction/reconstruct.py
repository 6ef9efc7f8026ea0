"""The pass that learns roundings: unit by unit, resumable, in bounded memory."""

from __future__ import annotations

import hashlib
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qexp.calibration.cache import tensor_hash
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.layers.swap import evaluating, quantizers_off
from qexp.passes.base import Pass, PassContext
from qexp.passes.reconstruction.capture import activation_quantizers, activations_off, importance, inputs, targets
from qexp.passes.reconstruction.joining import joined_units
from qexp.passes.reconstruction.learn import Options, Task, learn, total
from qexp.passes.reconstruction.rounding import SoftRounding
from qexp.passes.reconstruction.store import Store
from qexp.passes.reconstruction.units import Unit, find_units
from qexp.quantizers.base import Quantizer
from qexp.system.whole_files import whole

log = logging.getLogger(__name__)
FOLDER = Path("checkpoints") / "reconstruction"
LOSSES = ("mse", "fisher_diag")


@dataclass(frozen=True)
class Sweep:
    """One pass over all units.

    Attributes:
        name: Name in messages and files.
        options: How a unit is learned.
        roundings, steps: Whether roundings and activation steps are learned.
        activations: Whether activations are quantized while it learns.
        loss: `mse`, or `fisher_diag`: each output value is weighted by its squared gradient.
    """

    name: str
    options: Options
    roundings: bool = True
    steps: bool = False
    activations: bool = True
    loss: str = "mse"


class Reconstruction(Pass):
    """Learns the parameters that bring each unit's output nearest to the float network's; a method defines the sweeps.

    Targets come from the float network, inputs from the network quantized so far. A unit whose error ends larger than it began is
    restored. Each finished unit is written to the run's folder: a killed run resumes at the next unit, with the same result.

    Args:
        sweeps: The passes over the units, in order.
        units: `layers`, `blocks`, or names of modules (see `find_units`).
        memory_mb: Limit of the activations kept in memory at one time, in MiB; the rest goes to a file in the run's folder.
        join: How many pairs of neighbouring units are reconstructed as one: those whose capacities differ most (see `joined_units`).
    """

    def __init__(self, sweeps: Sequence[Sweep], units: str | Sequence[str], memory_mb: float, join: int = 0) -> None:
        for sweep in sweeps:
            _check(type(self).__name__, sweep)
        if not memory_mb >= 0:
            raise QexpError(
                f"{type(self).__name__}: memory_mb={memory_mb!r} is not allowed; use 0 (all in a file) or more"
            )
        if isinstance(join, bool) or not (isinstance(join, int) and join >= 0):
            raise QexpError(f"{type(self).__name__}: join={join!r} is not allowed; use 0 (no unit is joined) or more")
        self.sweeps, self.units, self.memory_mb, self.join = tuple(sweeps), units, memory_mb, join

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Learns; reports how many roundings moved, how many were undecided, the seconds, and the memory activations took."""
        started, n = time.perf_counter(), sum(map(len, context.images))
        largest = max(sweep.options.batch for sweep in self.sweeps)
        if n < largest:
            raise QexpError(
                f"{type(self).__name__}: {n} calibration images do not fill a batch of {largest}; "
                f"use more images (n_calibrate) or a batch of at most {n}"
            )
        with evaluating(model), _frozen(model), _on(model, context.device) as device:
            example = context.images[0][:2].to(device)
            units = find_units(model, context.facts, self.units, example)
            units = joined_units(model, units, self.join, example) if self.join else units
            walk = _Walk(model, units, context, self.memory_mb, self._content(model, context))
            with tqdm(
                total=sum(len(units) * sweep.options.iterations for sweep in self.sweeps),
                desc=type(self).__name__,
                unit="it",
                leave=False,
                disable=not context.progress,
            ) as bar:
                for number, sweep in enumerate(self.sweeps):
                    with nullcontext() if sweep.activations else activations_off(model):
                        for index in range(len(units)):
                            walk.unit(number, sweep, index, bar)
        learned = [model.get_submodule(name).weight_quantizer for unit in units for name in unit.layers]
        weights = sum(q.shift.numel() for q in learned if q.shift is not None)
        context.findings |= {
            "reconstructed_units": len(units),
            "roundings_moved": round(100 * sum(q.moved for q in learned) / max(weights, 1), 3),
            "roundings_undecided": round(100 * walk.undecided / max(weights, 1), 4),
            "reconstruct_seconds": round(time.perf_counter() - started + walk.seconds_before, 1),
            "reconstruct_kept_mb": round(walk.kept / 2**20, 1),
            "reconstruct_spilled_mb": round(walk.spilled / 2**20, 1),
        }

    def _content(self, model: nn.Module, context: PassContext) -> str:
        """Returns a hash of everything the result depends on; kept units with another hash are not used."""
        images = tensor_hash({str(i): batch for i, batch in enumerate(context.images)})
        units = f"{self.units} join {self.join}" if self.join else f"{self.units}"
        text = f"{self.sweeps} {units} {context.seed} {tensor_hash(model.state_dict())} {images}"
        return hashlib.sha256(text.encode()).hexdigest()


class _Walk:
    """The loop over the units, and the files it keeps."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], context: PassContext, memory_mb: float, content: str
    ) -> None:
        self.model, self.units, self.context, self.memory_mb, self.content = model, units, context, memory_mb, content
        self.folder = context.folder and context.folder / FOLDER
        self.going_on = self.folder is not None  # stops at the first unit without a file
        self.undecided = self.kept = self.spilled = 0
        self.seconds_before = 0.0

    def unit(self, number: int, sweep: Sweep, index: int, bar: tqdm) -> None:
        """Learns one unit, or loads it from its file."""
        unit = self.units[index]
        path = self.folder and self.folder / f"{number}-{index:03d}-{unit.name}.pt"
        bar.set_postfix_str(f"{sweep.name} {unit.name} ({index + 1}/{len(self.units)})")
        report = self._restored(unit, path)
        if report is None:
            report = self._learned(number, sweep, index, bar)
            self._keep(unit, path, report)
        else:
            self.seconds_before += report["seconds"]
            bar.total -= sweep.options.iterations
            bar.refresh()
        self.undecided += int(report["undecided"])

    def _learned(self, number: int, sweep: Sweep, index: int, bar: tqdm) -> dict[str, float]:
        model, context, unit, options = self.model, self.context, self.units[index], sweep.options
        quantized = activation_quantizers(model, unit)
        steps = [p for q in quantized for p in q.parameters()] if sweep.steps else []
        if not sweep.roundings and not steps:
            bar.total -= options.iterations
            bar.refresh()
            return {"undecided": 0, "seconds": 0.0}
        begun = time.perf_counter()
        task, store = self._task(unit, sweep)
        device = next(model.parameters()).device
        before, state = total(task, options, device), _state(model, unit)
        layers = [model.get_submodule(name) for name in unit.layers] if sweep.roundings else []
        fitted = [layer.weight_quantizer for layer in layers]
        soft = [SoftRounding(q, layer.weight) for q, layer in zip(fitted, layers)]
        generator = torch.Generator().manual_seed(context.seed * 1_000_003 + number * 10_007 + index)
        for layer, rounding in zip(layers, soft):
            layer.weight_quantizer = rounding
        for p in steps:
            p.requires_grad_()

        def tick(done: int, error: float) -> None:
            bar.update(done)
            bar.set_postfix_str(f"{sweep.name} {unit.name} ({index + 1}/{len(self.units)}), error {error:.4g}")

        try:
            done = learn(
                task, soft, steps, quantized if options.drop_prob < 1 or steps else [], options, generator, tick
            )
        finally:
            for layer, quantizer in zip(layers, fitted):
                layer.weight_quantizer = quantizer
            for p in steps:
                p.requires_grad_(False)
        bar.total -= options.iterations - done
        undecided = sum(r.undecided() for r in soft)
        for rounding, layer in zip(soft, layers):
            rounding.harden(layer.weight)
        after = total(task, options, device)
        kept = "" if after <= before else "; worse than before, so nothing was changed"
        if kept:
            _load(model, unit, state)
        self.kept, self.spilled = max(self.kept, store.in_memory), max(self.spilled, store.spilled)
        seconds = time.perf_counter() - begun
        log.info(
            "%s %s: error %.4g -> %.4g in %d iterations, %d roundings moved, %d undecided, %.1f s%s",
            sweep.name,
            unit.name,
            before,
            after,
            done,
            sum(q.moved for q in fitted),
            undecided,
            seconds,
            kept,
        )
        return {"undecided": undecided, "seconds": seconds}

    def _task(self, unit: Unit, sweep: Sweep) -> tuple[Task, Store]:
        """Returns the unit's target, from runs of the float network and of the network quantized so far."""
        model, context = self.model, self.context
        store = Store(self.memory_mb, self.folder, next(model.parameters()).device)
        y = targets(model, unit, context.images, store)
        x = inputs(model, unit, context.images, store)
        floating = weights = None
        if sweep.options.drop_prob < 1:
            with quantizers_off(model):
                floating = inputs(model, unit, context.images, store)
        if sweep.loss == "fisher_diag":
            weights = importance(model, context.facts, unit, context.images, store)
        return Task(unit.name, lambda x: unit(model, x), x, y, floating, weights), store

    def _restored(self, unit: Unit, path: Path | None) -> dict[str, float] | None:
        """Loads a unit that an earlier run of the same content finished, and returns its report."""
        if not self.going_on:
            return None
        try:
            kept = torch.load(path, map_location=next(self.model.parameters()).device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            kept = {}
        if kept.get("content") != self.content:
            self.going_on = False
            return None
        _load(self.model, unit, kept["state"])
        log.info("%s: learned earlier, %s", unit.name, path)
        return kept["report"]

    def _keep(self, unit: Unit, path: Path | None, report: dict[str, float]) -> None:
        if path is None:
            return
        with whole(path) as part:
            torch.save({"content": self.content, "state": _state(self.model, unit), "report": report}, part)


def _state(model: nn.Module, unit: Unit) -> dict[str, dict[str, Any]]:
    """Returns a copy of the state of every quantizer inside a unit."""
    return {key: {k: v.clone() for k, v in q.state_dict().items()} for key, q in _inside(model, unit)}


def _load(model: nn.Module, unit: Unit, state: dict[str, dict[str, Any]]) -> None:
    for key, quantizer in _inside(model, unit):
        if key in state:
            quantizer.load_state_dict(state[key])


def _inside(model: nn.Module, unit: Unit) -> Iterator[tuple[str, Quantizer]]:
    """Yields the quantizers of a unit, each with a unique key; keys of modules before the last contain the module's name."""
    for module in unit.modules:
        for name, site, quantizer in quantizers(model.get_submodule(module)):
            yield f"{name}|{site}" if module == unit.name else f"{module}:{name}|{site}", quantizer


@contextmanager
def _on(model: nn.Module, device: torch.device | None) -> Iterator[torch.device]:
    """Context manager: moves the model to a device (None: leaves it) and yields that device."""
    home = next(model.parameters()).device
    model.to(device or home)
    try:
        yield device or home
    finally:
        model.to(home)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Context manager: no parameter requires a gradient."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, asked in before:
            p.requires_grad_(asked)


def _check(name: str, sweep: Sweep) -> None:
    o = sweep.options
    for key, value, allowed, good in (
        ("loss", sweep.loss, ", ".join(LOSSES), sweep.loss in LOSSES),
        ("iterations", o.iterations, "1 and more", isinstance(o.iterations, int) and o.iterations >= 1),
        ("batch", o.batch, "1 and more", isinstance(o.batch, int) and o.batch >= 1),
        ("lr", o.lr, "more than 0", o.lr > 0),
        ("step_lr", o.step_lr, "0 and more", o.step_lr >= 0),
        ("warmup", o.warmup, "0..1, 1 left out", 0 <= o.warmup < 1),
        (
            "beta",
            o.beta,
            "two positive numbers, the first not the lesser",
            len(o.beta) == 2 and o.beta[0] >= o.beta[1] > 0,
        ),
        ("drop_prob", o.drop_prob, "0..1", 0 <= o.drop_prob <= 1),
        ("exponent", o.exponent, "more than 0", o.exponent > 0),
        ("strength", o.strength, "0 and more", o.strength >= 0),
    ):
        if not good:
            raise QexpError(f"{name}: {sweep.name} {key}={value!r} is not allowed; use {allowed}")
