"""The base class of passes: edits of the model at one of four moments of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.network.facts import Facts
from qexp.passes.fold_bn import Normal
from qexp.results.judging import Judge


@dataclass
class PassContext:
    """What a pass may use besides the model.

    Attributes:
        facts: Facts of the model's graph. A pass that replaces modules of the float model reads them again.
        images: Calibration batches `[N, C, H, W]`.
        findings: Results of the passes, by name; they go into the record.
        calibration: Statistics by (layer, site) of the float model; None before calibration.
        folded: Distribution of the results of each convolution with a folded batch norm, by layer.
        folder: The run's folder. A long pass keeps files in it, so that a killed run can be resumed; None keeps nothing.
        seed: Seed of the run.
        device: Device for passes with much computation; None leaves the model where it is.
        progress: Show progress bars.
        judge: The network's task, which computes decisions from its outputs; None if a pass is tried without one.
    """

    facts: Facts
    images: Sequence[Tensor]
    findings: dict[str, Any]
    calibration: Any = None
    folded: dict[str, Normal] = field(default_factory=dict)
    folder: Path | None = None
    seed: int = 0
    device: torch.device | None = None
    progress: bool = True
    judge: Judge | None = None


class Pass:
    """An edit of the model, in place. A subclass overrides the methods it needs; the others do nothing.

    A recipe lists passes by name under `passes:`. `passes=` on the command line adds others, named in `conf/passes`. At each moment the
    passes of the recipe run first, then the others, each in the order written. A name in both runs once, in the recipe's position.

    Attributes:
        keeps_results: Whether the float network computes the same results after `on_float`; every run then checks this. A pass that
            changes results by design sets it to False.
    """

    keeps_results: bool = True

    def on_float(self, model: nn.Module, context: PassContext) -> None:
        """Edits the float weights, after batch norm is folded (where it is) and before quantizers are attached."""

    def on_statistics(self, model: nn.Module, context: PassContext) -> None:
        """Edits quantizers that have statistics but no range yet: sets bits for each channel, for example."""

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Edits the calibrated model: corrects biases, re-estimates batch norms, learns roundings."""

    def on_trained(self, model: nn.Module, context: PassContext) -> None:
        """Inspects or edits the network after its training with quantizers and before its evaluation; not called without training."""
