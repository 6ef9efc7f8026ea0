"""Searches that a configuration can name: sensitivity alone, or bits under a budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from qexp.errors import QexpError
from qexp.recipe.plan import Plan
from qexp.search.assign import assign
from qexp.search.budget import limits, spent
from qexp.search.context import SearchContext, measured
from qexp.search.hessian import traces, weigh
from qexp.search.quantizers_by_width import Key, QuantizersByWidth
from qexp.search.sensitivity import ranked

log = logging.getLogger(__name__)
_NAMED = 5  # number of layers in a log line
_CURVATURE_IMAGES = (
    128  # each image costs a second backward pass per layer and probe; fewer images already give a stable estimate
)


class Sensitivity:
    """Measures each tensor alone at each width; the plan stays unchanged.

    Writes `sensitivity.csv` into the run folder (columns: see `sensitivity.sensitivity`).

    Args:
        widths: Bits to try.
        sites: `weight`, `input`, or both.
        layers: Pattern of the layers to examine.
        images: Number of images of the training side.
        memory_mb: Limit of the layer results kept to avoid computing the first layers again, in MiB.
    """

    name = "sensitivity"

    def __init__(
        self,
        widths: Sequence[int] = (2, 3, 4, 5, 6, 8),
        sites: Sequence[str] = ("weight", "input"),
        layers: str = "*",
        images: int = 512,
        memory_mb: int = 1024,
    ) -> None:
        unknown = set(sites) - {"weight", "input"}
        if unknown or not sites:
            raise QexpError(f"search.sites={list(sites)} is not allowed; use weight, input, or both")
        self.widths, self.sites, self.layers, self.images, self.memory_mb = widths, sites, layers, images, memory_mb

    def __call__(self, setting: SearchContext) -> Plan:
        """Returns the plan with which the run continues."""
        shelf = self.shelf(setting)
        self.table(setting, shelf)
        return setting.plan

    def shelf(self, setting: SearchContext) -> QuantizersByWidth:
        """Returns every searched tensor's quantizer at every width."""
        return QuantizersByWidth(setting.model, setting.plan, setting.facts, self.widths, setting.fit, self.layers)

    def keys(self, shelf: QuantizersByWidth) -> list[Key]:
        """Returns the tensors to choose for."""
        keys = [key for key in shelf.keys if key[1] in self.sites]
        if not keys:
            raise QexpError(f"search: no quantized {' or '.join(self.sites)} is left to choose")
        return keys

    def table(self, setting: SearchContext, shelf: QuantizersByWidth) -> pd.DataFrame:
        """Returns the sensitivities, writes them, and logs the most sensitive tensors."""
        start = time.perf_counter()
        table = measured(setting, shelf, self.keys(shelf), self.images, self.memory_mb)
        setting.write("sensitivity.csv", table)
        setting.findings |= {
            "search": self.name,
            "search_images": self.images,
            "seconds_sensitivity": round(time.perf_counter() - start, 2),
        }
        first = ranked(table).head(_NAMED)
        most = ", ".join(f"{r.layer} {r.site} {r.divergence:.3g}" for r in first.itertuples())
        log.info("most sensitive at %d bits, by distance from the float network's results: %s", table.bits.min(), most)
        return table


class Allocate(Sensitivity):
    """Chooses each tensor's bits: the least summed sensitivity within a budget.

    The default budget is the cost of the run's own widths: `bits=w4a4 search=allocate` spends the weight bytes and bit operations of W4A4
    where they help most. The run continues with the chosen plan (`plan=` reads its `layers.csv`), so a training schedule trains it.

    Args:
        widths, sites, layers, images, memory_mb: See `Sensitivity`.
        budget: By kind (`weight_bytes`, `bops`, `mean_wbit`, `mean_abit`): a number, `same`, a share such as `75%`, or null.
        hessian: Weight the weight errors by the curvature of the loss instead of trying each weight tensor at each width.
        probes: Random vectors for the estimate of the curvature.
    """

    name = "allocate"

    def __init__(
        self,
        widths: Sequence[int] = (2, 3, 4, 5, 6, 8),
        sites: Sequence[str] = ("weight", "input"),
        layers: str = "*",
        images: int = 512,
        memory_mb: int = 1024,
        budget: Mapping[str, object] | None = None,
        hessian: bool = False,
        probes: int = 4,
    ) -> None:
        super().__init__(widths, sites, layers, images, memory_mb)
        self.budget = dict(budget) if budget is not None else {"weight_bytes": "same", "bops": "same"}
        self.hessian, self.probes = hessian, probes

    def __call__(self, setting: SearchContext) -> Plan:
        shelf = self.shelf(setting)
        table = self.table(setting, shelf)
        choice = self.choose(setting, table)
        shelf.take(choice)
        shelf.close()
        return shelf.plan_of(choice, f"search.{self.name}")

    def table(self, setting: SearchContext, shelf: QuantizersByWidth) -> pd.DataFrame:
        if not self.hessian:
            return super().table(setting, shelf)
        images = [x for x, _ in setting.first(min(self.images, _CURVATURE_IMAGES))]
        trace = traces(shelf, torch.cat(images), self.probes, seed=setting.seed, progress=setting.progress)
        weights = weigh(shelf, trace, shelf.widths)
        tried = [key for key in self.keys(shelf) if key[1] == "input"]
        inputs = measured(setting, shelf, tried, self.images, self.memory_mb) if tried else pd.DataFrame()
        table = pd.concat([weights, inputs], ignore_index=True)
        setting.write("sensitivity.csv", table)
        setting.findings |= {"search": f"{self.name} (hessian)", "search_images": self.images}
        return table

    def bounds(self, setting: SearchContext) -> dict[str, float]:
        """Returns the budget as numbers."""
        return limits(self.budget, setting.plan.bits("weight"), setting.plan.bits("input"), setting.costs)

    def choose(self, setting: SearchContext, table: pd.DataFrame) -> dict[Key, int]:
        """Returns the widths within the budget, and logs their cost beside that of the current plan."""
        costs, bounds = setting.costs, self.bounds(setting)
        wbits, abits = setting.plan.bits("weight"), setting.plan.bits("input")
        choice = assign(table, setting.fixed, costs, bounds)
        after = {**setting.fixed, **choice}
        new_w = {layer: b for (layer, site), b in after.items() if site == "weight"}
        new_a = {layer: b for (layer, site), b in after.items() if site == "input"}
        for kind, bound in bounds.items():
            now = spent(kind, new_w, new_a, costs)
            log.info(
                "search: %s %.6g of %.6g allowed (the configured widths: %.6g)",
                kind,
                now,
                bound,
                spent(kind, wbits, abits, costs),
            )
            setting.findings[f"search_{kind}"] = now
        return choice
