"""Compares the records of two runs of one network: the calls must be the same; numbers may depend on the batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qexp.network.graph import PerImage, Ref, Step, same


class Refused(Exception):
    """The records of a run do not represent the network; the message holds the reason."""


def merge(one: list[Step], other: list[Step], images: int, others: int) -> None:
    """Replaces numbers that depend on the batch size by `PerImage` in the records `one`; raises `Refused` where the runs differ."""
    numbers = {id(step): i for steps in (one, other) for i, step in enumerate(steps)}
    for a, b in zip(one, other):
        if (a.op, a.name, a.target, a.results) != (b.op, b.name, b.target, b.results):
            raise Refused(f"the calls depend on the images: {b.name} ran where {a.name} ran before")
        at = _Same(a.name, numbers, images, others)
        a.args, a.kwargs = at.both(a.args, b.args), at.both(a.kwargs, b.kwargs)
        at.both(list(a.changed), list(b.changed))
    if len(one) != len(other):
        raise Refused("the calls depend on the images: one run made more calls than the other")


@dataclass
class _Same:
    """Compares the arguments of a step in two runs."""

    step: str
    numbers: dict[int, int]
    images: int
    others: int

    def both(self, a: Any, b: Any) -> Any:
        if isinstance(a, Ref) and isinstance(b, Ref):
            if (self.numbers[id(a.step)], a.index) != (self.numbers[id(b.step)], b.index):
                raise Refused(f"{self.step} reads {b.step.name} instead of {a.step.name} on other images")
            return a
        if isinstance(a, PerImage):
            self._number(a.at(self.images), b)
            return a
        if type(a) is type(b) and isinstance(a, tuple | list) and len(a) == len(b):
            parts = [self.both(x, y) for x, y in zip(a, b)]
            return parts if isinstance(a, list) else type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
        if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
            return {k: self.both(a[k], b[k]) for k in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(self.both(a.start, b.start), self.both(a.stop, b.stop), self.both(a.step, b.step))
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a is not b and not same(a, b):
                raise Refused(f"{self.step} takes a different tensor on other images")
            return a
        return self._number(a, b)

    def _number(self, a: Any, b: Any) -> Any:
        if type(a) is int and type(b) is int and a != b and self.images != self.others:
            each, rest = divmod(b - a, self.others - self.images)
            if not rest:
                return PerImage(a - each * self.images, each)
        if type(a) is not type(b) or not _alike(a, b):
            raise Refused(f"{self.step} takes {b!r} instead of {a!r} on other images"[:200])
        return a


def _alike(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b) or (a != a and b != b) or not _plain(a)
    except Exception:  # objects that cannot be compared
        return True


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | str | bytes | None | torch.dtype | torch.device)
