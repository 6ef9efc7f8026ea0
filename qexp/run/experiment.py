"""The state of one run: a single object that its steps read and add to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qexp.calibration.site_stats import Calibration
from qexp.data.contract import DataSet
from qexp.network.facts import Facts
from qexp.passes.base import Pass, PassContext
from qexp.recipe import Plan
from qexp.results.run_folder import Record
from qexp.run.naming import title
from qexp.run.saved_network import Origin
from qexp.run.settings import Settings
from qexp.run.trackers import Trackers
from qexp.tasks.base import Score


@dataclass
class Experiment:
    """One run.

    Attributes:
        settings: The settings of the run.
        data: The images.
        record: The run's folder.
        model: The network, edited in place from float to quantized and trained.
        context: What passes may read: facts of the network, calibration images and their statistics, findings.
        passes: Edits of the model, in the order they run.
        rules: Rules that the run adds to those of the recipe.
        plan: The quantizer of each tensor; empty until the recipe is resolved.
        origin: The origin of the network: its weights and its code before the run changed it.
        params: Parameters of the float network.
        reference: The float network's score; None where there is none.
        score: The quantized network's score; None until it is evaluated.
        trackers: Where the point sends its curves and results.
        kernels: The implementation of the kernels that was loaded.
        seconds: Seconds spent, by step.
        metrics: The run's row of results; empty until the end.
    """

    settings: Settings
    data: DataSet
    record: Record
    model: nn.Module
    context: PassContext
    passes: Sequence[Pass] = ()
    rules: dict[str, Any] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: Plan(()))
    origin: Origin | None = None
    params: int = 0
    reference: Score | None = None
    score: Score | None = None
    trackers: Trackers = field(default_factory=Trackers)
    kernels: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """A short name of the point, for progress bars and logs."""
        return title(self.settings)

    @property
    def folder(self) -> Path:
        """The folder of the run's files."""
        return self.record.folder

    @property
    def facts(self) -> Facts:
        """The facts read from the network."""
        return self.context.facts

    @property
    def images(self) -> Sequence[Tensor]:
        """Calibration batches `[N, C, H, W]`."""
        return self.context.images

    @property
    def statistics(self) -> Calibration:
        """The statistics that calibration collected."""
        return self.context.calibration

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the seconds of a `with` block to those of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
