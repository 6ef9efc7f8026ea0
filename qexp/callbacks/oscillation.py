"""Counts weights that oscillate between two levels, pulls them to the middle of their bin, or freezes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.quantizers.base import AffineQuantizer, Quantizer

OSCILLATES = (
    0.005  # a weight that reverses more often than this, in a moving average, counts as oscillating (as in the paper)
)


class Memory:
    """The memory of one weight tensor: its codes, the last change of each, and how often each change was reversed.

    Attributes:
        codes: Codes after the last step, int32.
        direction: Direction of each code's last change: -1, 1, or 0 where it has never changed; int8.
        frequency: Moving average of how often a change goes against the one before it.
        average: Moving average of the codes; None where nothing is to be frozen.
        frozen: Mask of the weights that stay on their code until the end; None where nothing is to be frozen.
    """

    def __init__(self, codes: Tensor, freezing: bool) -> None:
        self.codes = codes
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.average = codes.float() if freezing else None
        self.frozen = torch.zeros_like(codes, dtype=torch.bool) if freezing else None

    def update(self, codes: Tensor, momentum: float) -> None:
        """Updates the memory with the codes after a step: `o = changed and against the last change; f <- m o + (1 - m) f`."""
        step = torch.sign(codes - self.codes).to(torch.int8)
        turned = step * self.direction < 0
        self.frequency.lerp_(turned.float(), momentum)
        self.direction = torch.where(step != 0, step, self.direction)
        self.codes = codes
        if self.average is not None:
            self.average.lerp_(codes.float(), momentum)

    def freeze(self, threshold: float) -> None:
        """Freezes every weight that reverses more often than the threshold, on the code nearest to its average."""
        fresh = (self.frequency > threshold) & ~self.frozen
        self.codes = torch.where(fresh, self.average.round().to(self.codes.dtype), self.codes)
        self.frozen |= fresh


class Oscillation(Callback):
    """Follows the codes of every quantized weight from step to step; on request dampens or freezes those that oscillate.

    Freezing: where the frequency f exceeds a threshold, the weight becomes the value of its code's rounded moving average and stays on that
    code, whatever the gradient and the scale do. Damping: `lambda |w^ - clip(w)|^2` is added to the loss (its gradient to the weights,
    to be exact; w^ is held constant), lambda rising from 0 along a half cosine.

    Args:
        momentum: Momentum of the moving averages, m in `f <- m o + (1 - m) f`.
        freeze: Threshold on f; two numbers move it from the first to the second along a half cosine; None freezes nothing.
        dampen: lambda at the end; None adds nothing.

    Source: Nagel, Fournarakis, Bondarenko, Blankevoort 2022 (arXiv 2203.08086), equations 4-8 and algorithm 1.
    Differs from the paper: nothing known; the paper's threshold falls from 0.04 to 0.01, its lambda rises to 1e-4 .. 1e-2.
    """

    def __init__(
        self,
        momentum: float = 0.01,
        freeze: float | Sequence[float] | None = None,
        dampen: float | None = None,
    ) -> None:
        if not 0 < momentum < 1:
            raise QexpError(
                f"schedule.oscillation.momentum={momentum} is not allowed; use a number between 0 and 1, such as 0.01"
            )
        ends = [freeze] if isinstance(freeze, int | float) else list(freeze or [])
        if len(ends) > 2 or not all(0 < f < 1 for f in ends):
            raise QexpError(
                f"schedule.oscillation.freeze={freeze} is not allowed; use a frequency between 0 and 1 such as 0.02, or two: [0.04,0.01]"
            )
        if dampen is not None and dampen <= 0:
            raise QexpError(
                f"schedule.oscillation.dampen={dampen} is not allowed; use a number above 0, such as 1e-3, or null"
            )
        self.momentum, self.thresholds, self.dampen = momentum, ends, dampen
        self.memory: dict[str, Memory] = {}
        self._weights: list[tuple[str, Tensor, Quantizer]] = []
        self._handles: list = []
        self._total = 1
        self._loaded: dict[str, Any] = {}

    # -- with a Trainer ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = int(trainer.estimated_stepping_batches)
        self.follow(pl_module.model)
        for name, saved in self._loaded.items():
            for key, value in saved.items():
                setattr(self.memory[name], key, value.to(self.memory[name].codes.device))
        self._loaded = {}
        self._handles = [
            o.register_step_post_hook(lambda *_: self.after_step((trainer.global_step + 1) / self._total))
            for o in trainer.optimizers
        ]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.dampen is not None:
            self.pull(trainer.global_step / self._total)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        return {name: {k: v for k, v in vars(m).items() if v is not None} for name, m in self.memory.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    # -- without -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, model: torch.nn.Module) -> None:
        """Starts to follow every quantized weight of a model; drops what was remembered before.

        Raises:
            QexpError: Weights are to be frozen or pulled, but their method has no fixed value for a code.
        """
        seen: set[int] = set()
        self._weights, self.memory = [], {}
        for name, site, quantizer in quantizers(model):
            weight = model.get_submodule(name).weight if site == "weight" else None
            if weight is None or id(weight) in seen or not weight.requires_grad:
                continue
            if (self.thresholds or self.dampen) and not _holds(quantizer):
                raise QexpError(
                    f"{quantizer.name}: schedule.oscillation.{'freeze' if self.thresholds else 'dampen'} needs a method whose levels are "
                    f"values of the weight itself (lsq, minmax, tqt ...); {type(quantizer).__name__} transforms the weight first"
                )
            seen.add(id(weight))
            self._weights.append((name, weight, quantizer))
            self.memory[name] = Memory(quantizer.codes(weight).to(torch.int32), bool(self.thresholds))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Records the codes after an optimizer step and holds the frozen weights, at this share of the training."""
        for name, weight, quantizer in self._weights:
            if _diverged(quantizer):
                return  # there are no codes; `Divergence` ends the training after this step and names the layer
            memory = self.memory[name]
            codes = quantizer.codes(weight).to(torch.int32)
            if memory.frozen is None:
                memory.update(codes, self.momentum)
                continue
            memory.update(torch.where(memory.frozen, memory.codes, codes), self.momentum)
            memory.freeze(self.threshold(progress))
            held = quantizer.dequantize(memory.codes.float()).to(weight.dtype)
            weight.copy_(torch.where(memory.frozen, held, weight))

    @torch.no_grad()
    def pull(self, progress: float) -> None:
        """Adds the damping's gradient `2 lambda (w - w^)` to each weight inside its range, at this share of the training."""
        strength = self.dampen * 0.5 * (1 - math.cos(math.pi * min(progress, 1.0)))
        for _, weight, quantizer in self._weights:
            if weight.grad is None or strength == 0:
                continue
            low, high = (quantizer.dequantize(torch.zeros_like(weight) + q) for q in quantizer.limits)
            inside = (weight >= low) & (weight <= high)
            weight.grad.add_((weight - quantizer(weight)) * inside, alpha=2 * strength)

    def threshold(self, progress: float) -> float:
        """Returns the frequency above which weights are frozen, at this share of the training."""
        first, last = self.thresholds[0], self.thresholds[-1]
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def shares(self) -> Iterator[tuple[str, float, float]]:
        """Yields each layer with its share of oscillating and of frozen weights, in percent."""
        for name, memory in self.memory.items():
            frozen = memory.frozen if memory.frozen is not None else torch.zeros(1, dtype=torch.bool)
            moving = memory.frequency > OSCILLATES
            if memory.frozen is not None:
                moving = moving & ~memory.frozen
            yield name, 100 * float(moving.float().mean()), 100 * float(frozen.float().mean())


def _diverged(quantizer: Quantizer) -> bool:
    """Returns whether a learned scale has diverged; checked on the CPU only, where the check does not wait for a device."""
    watched = getattr(quantizer, "must_stay_positive", None)
    scale = watched() if callable(watched) else None
    return scale is not None and scale.device.type == "cpu" and not bool((torch.isfinite(scale) & (scale > 0)).all())


def _holds(quantizer: Quantizer) -> bool:
    """Returns whether a weight that is set to a code's value has that code, so that it can be held there."""
    return isinstance(quantizer, AffineQuantizer) and "idempotent" in quantizer.properties and quantizer.gain is None
