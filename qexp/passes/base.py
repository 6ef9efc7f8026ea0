"""What a pass is: an edit of the model at one of four moments of a run."""

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
    """What a pass may look at besides the model.

    Attributes:
        facts: What the graph says; a pass that puts other modules into the float model reads it off anew.
        images: Calibration batches `[N, C, H, W]`.
        findings: What passes report, by name; goes into the record.
        calibration: Statistics by (layer, site) of the float model; None before calibration.
        folded: How the results of convolutions with a folded batch norm are distributed, by layer.
        folder: The run's folder, for what a long pass keeps so that a killed run can go on; None keeps nothing.
        seed: The run's.
        device: Where a pass that computes much may do so; None leaves the model where it is.
        progress: Show progress bars.
        judge: The network's task, which knows what its outputs decide; None where a pass is tried without one.
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
    """An edit of the model, in place; a subclass writes the moments it needs, the others do nothing.

    A recipe lists passes by name under `passes:`, and `passes=` on the command line adds others, named in `conf/passes`. At each moment the
    recipe's come first, then the others, each in the order written; a name that stands in both takes the recipe's place.

    Attributes:
        keeps_results: Whether the float network computes the same after `on_float`, which every run then checks; a pass whose edit changes
            results by design sets it to False.
    """

    keeps_results: bool = True

    def on_float(self, model: nn.Module, context: PassContext) -> None:
        """Edits the float weights, after batch norm is folded (where it is) and before quantizers are attached."""

    def on_statistics(self, model: nn.Module, context: PassContext) -> None:
        """Edits quantizers that know what was seen but not yet their range: bits for each channel, say."""

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Edits the calibrated model: corrects biases, re-estimates batch norms, learns roundings."""

    def on_trained(self, model: nn.Module, context: PassContext) -> None:
        """Looks at the network after its training with quantizers, before it is evaluated; not called where nothing was trained."""
