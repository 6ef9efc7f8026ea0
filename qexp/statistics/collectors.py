"""Collectors: statistics that calibration gathers on request, in addition to the summary of every tensor.

A quantizer names its collectors in `collectors`. Calibration then runs them on all candidate tensors, so that every recipe with the same
collectors can use the stored statistics. `fit` receives the result as `stats.extra[name]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from qexp.system import ranks


class DifferentShapes(Exception):
    """A collector cannot merge its summaries: the calls of one layer have tensors of different shapes."""


class Collector(Protocol):
    """A running summary of one tensor, held as a single tensor: updated batch by batch, mergeable over ranks."""

    name: str

    def first(self, x: Tensor) -> Tensor:
        """Returns the summary of one batch `[N, C, ...]`, float32."""

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns two summaries merged into one; raises `DifferentShapes` where they cannot be merged."""


@dataclass(frozen=True)
class MaxMap:
    """Collects the greatest `|x|` at every position over all images: `[N, C, H, W] -> [C, H, W]`.

    Source: the feature maps from which TF2-Engine (CAQ) computes its exponents.
    """

    name: str = "max_map"

    def first(self, x: Tensor) -> Tensor:
        return x.abs().amax(0)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise DifferentShapes
        return torch.maximum(a, b)


@dataclass(frozen=True)
class LeastMagnitude:
    """Collects the least nonzero `|x|`, `[1]`; infinite where all values are zero."""

    name: str = "least_magnitude"

    def first(self, x: Tensor) -> Tensor:
        magnitude = x.abs()
        return torch.where(magnitude > 0, magnitude, torch.inf).amin().reshape(1)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)


def merged(collector: Collector, held: Tensor | None, new: Tensor) -> Tensor:
    """Returns `held` and `new` merged, on the CPU; only `new` where nothing is held yet."""
    new = new.float().cpu()
    return new if held is None else collector.merge(held, new)


def synced(collector: Collector, held: Tensor) -> Tensor:
    """Returns the merged summary of all ranks of a distributed run; `held` where the run is not distributed."""
    return reduce(collector.merge, ranks.gathered(held))
