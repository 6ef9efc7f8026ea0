"""What calibration collects on request, beside the summary every tensor gets.

A quantizer names its collectors in `collectors`; all candidate tensors are then collected, so that the kept statistics serve any recipe
that asks for the same. What was collected reaches `fit` as `stats.extra[name]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from qexp.system import ranks


class DifferentShapes(Exception):
    """A collector cannot merge what it saw: a layer that is called several times had tensors of different shapes."""


class Collector(Protocol):
    """A running summary of one tensor: a single tensor, updated batch by batch, that two ranks can merge."""

    name: str

    def first(self, x: Tensor) -> Tensor:
        """Returns the summary of one batch `[N, C, ...]`, float32."""

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the summary of what two summaries have seen; raises `DifferentShapes` where there is none for both."""


@dataclass(frozen=True)
class MaxMap:
    """The greatest `|x|` at every position over all images: `[N, C, H, W] -> [C, H, W]`.

    Source: the feature maps that TF2-Engine (CAQ) takes its exponents from.
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
    """The least `|x|` that is not zero, `[1]`; infinite where all were zero."""

    name: str = "least_magnitude"

    def first(self, x: Tensor) -> Tensor:
        magnitude = x.abs()
        return torch.where(magnitude > 0, magnitude, torch.inf).amin().reshape(1)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)


def merged(collector: Collector, held: Tensor | None, new: Tensor) -> Tensor:
    """Returns `held` with `new` added, on the CPU; `new` alone at first."""
    new = new.float().cpu()
    return new if held is None else collector.merge(held, new)


def synced(collector: Collector, held: Tensor) -> Tensor:
    """Returns the summary of what all ranks of a distributed run have seen; without one, `held`."""
    return reduce(collector.merge, ranks.gathered(held))
