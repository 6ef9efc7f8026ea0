"""The inputs of a search: a calibrated network, the images to judge by, and the folder for results."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from qexp.calibration.cache import content_hash
from qexp.errors import QexpError
from qexp.network.cost import LayerCost, layer_costs
from qexp.network.facts import Facts
from qexp.recipe.plan import Plan
from qexp.results import identity
from qexp.results.judging import Judge
from qexp.search.quantizers_by_width import Key, QuantizersByWidth
from qexp.search.sensitivity import sensitivity
from qexp.system.whole_files import whole

log = logging.getLogger(__name__)


@dataclass
class SearchContext:
    """A calibrated network and its surroundings.

    Attributes:
        model: Carries the plan's quantizers, fitted.
        plan, facts: The model's plan and the facts of its graph.
        fit: Fits every quantizer on the model from the statistics already collected.
        batches: Images and labels of the training side; test images never enter a search.
        folder: Folder of the run; searches write their tables there.
        cache: Folder of files that runs share.
        seed: Seed of all random numbers.
        progress: Show progress bars.
        findings: Results that go into the record.
        judge: The network's task; None compares results as numbers alone.
    """

    model: nn.Module
    plan: Plan
    facts: Facts
    fit: Callable[[], None]
    batches: Sequence[tuple[Tensor, Any]]
    folder: Path
    cache: Path
    seed: int = 0
    progress: bool = True
    findings: dict[str, Any] = field(default_factory=dict)
    judge: Judge | None = None

    @property
    def costs(self) -> dict[str, LayerCost]:
        """Cost of every weighted layer, in order of execution."""
        return layer_costs(self.model, self.facts)

    @property
    def fixed(self) -> dict[Key, int]:
        """Widths of the current plan, by (layer, site)."""
        return {(layer, site): b for site in ("weight", "input") for layer, b in self.plan.bits(site).items()}

    def first(self, images: int) -> list[tuple[Tensor, Any]]:
        """Returns the first images, in batches, with their labels."""
        out, left = [], images
        for x, labels in self.batches:
            if left <= 0:
                break
            out.append((x[:left], labels[:left]))
            left -= len(x)
        if not out:
            raise QexpError(f"search.images={images} is not allowed; use 1 or more")
        return out

    def write(self, name: str, table: pd.DataFrame) -> Path:
        """Writes a table into the run folder, whole or not at all."""
        path = self.folder / name
        with whole(path) as part:
            table.to_csv(part, index=False)
        return path


def measured(
    setting: SearchContext, shelf: QuantizersByWidth, keys: Sequence[Key], images: int, memory_mb: int
) -> pd.DataFrame:
    """Returns the sensitivity table of these tensors; reads an earlier one of the same weights, images and quantizers."""
    batches = setting.first(images)
    specs = [[*key, setting.plan[key].spec] for key in keys]
    seen = content_hash(setting.model, [x for x, _ in batches], False)
    fitted = [[*key, b, shelf.quantizer(key, b).describe()] for key in keys for b in shelf.widths]
    judges = [] if setting.judge is None else [setting.judge]
    sources = identity.code(
        [*identity.named(specs), *judges, *(shelf.quantizer(key, b) for key in keys for b in shelf.widths)]
    )
    name = hashlib.sha256(json.dumps([seen, specs, fitted, shelf.widths, sources], default=str).encode()).hexdigest()[
        :20
    ]
    path = setting.cache / "search" / f"{name}.csv"
    if path.exists():
        log.info("sensitivity: measured earlier, %s", path)
        return pd.read_csv(path)
    table = sensitivity(shelf, setting.facts, batches, keys, memory_mb, setting.progress, setting.judge)
    with whole(path) as part:
        table.to_csv(part, index=False)
    return table
