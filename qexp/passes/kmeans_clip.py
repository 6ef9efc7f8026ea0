"""Clips float weights at the outermost of their cluster centres."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from qexp.errors import QexpError, near
from qexp.layers.quantized import WEIGHTED, float_class
from qexp.network.facts import Facts
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.kmeans import KMeans
from qexp.statistics.stats import TensorStats

log = logging.getLogger(__name__)


class KMeansClip(Pass):
    """Clips each layer's weights to [least centre, greatest centre] of its k-means codebook, before quantizers are attached.

    With float weights (layer_wbit=32) that is the source's mode `clip`; with quantized ones it narrows their min-max range.

    Args:
        bits: 2^bits centres.
        skip: Patterns of layers left alone; `@ends` is the first one and the classifier, as in the source.
        seed, n_init: See `KMeans`.

    Source: the mode `clip` of cnn-quantization's k-means models.
    """

    keeps_results = False  # weights beyond the outermost centres are clipped

    def __init__(self, bits: int = 4, skip: Sequence[str] = ("@ends",), seed: int = 0, n_init: int = 10) -> None:
        self.skip, self.options = list(skip), {"bits": bits, "seed": seed, "n_init": n_init}
        KMeans(**self.options)

    @torch.no_grad()
    def on_float(self, model: nn.Module, context: PassContext) -> None:
        """Clips, in place; reports the share of weights that changed."""
        layers = [n for n in context.facts.order if issubclass(float_class(model.get_submodule(n)), WEIGHTED)]
        skipped = self._skipped(layers, context.facts)
        total, changed = 0, 0
        clipped: set[int] = set()
        for name in layers:
            if name in skipped:
                continue
            weight = model.get_submodule(name).weight
            if weight.data_ptr() in clipped:
                continue  # several layers hold this weight
            clipped.add(weight.data_ptr())
            q = KMeans(shape=tuple(weight.shape), **self.options)
            q.fit(TensorStats.of(weight))
            low, high = q.centres[0], q.centres[-1]
            total, changed = total + weight.numel(), changed + int(((weight < low) | (weight > high)).sum())
            weight.clamp_(low, high)
        if not total:
            raise QexpError("KMeansClip: every weighted layer is skipped; name fewer under skip")
        context.findings["kmeans_clipped"] = round(100 * changed / total, 4)
        log.info("k-means clip: %d of %d weights lay beyond the outermost centres", changed, total)

    def _skipped(self, layers: list[str], facts: Facts) -> set[str]:
        found: set[str] = set()
        for pattern in self.skip:
            hits = {facts.first, facts.last} if pattern == "@ends" else {n for n in layers if fnmatchcase(n, pattern)}
            if not hits:
                raise QexpError(f"KMeansClip.skip: {pattern!r} matches no weighted layer{near(pattern, layers)}")
            found |= hits
        return found
