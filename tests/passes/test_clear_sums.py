"""Sums of two 8-bit tensors are the same code in float32 however a runtime orders its operations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.network.facts import facts
from qexp.passes import clear_sums
from tests.integer.conftest import INT8, quantize  # noqa: F401 - a fixture


def grid(scale: float, zero: int) -> SimpleNamespace:
    return SimpleNamespace(
        scale=torch.tensor([scale]), zero_point=torch.tensor([float(zero)]), limits=(0, 255), name=f"{scale}"
    )


def codes(a, b, reader, form: str) -> np.ndarray:
    """The codes of all sums, in float64 or as two ways of float32 give them."""
    kind = np.float64 if form == "exact" else np.float32
    s, zeros = [kind(q.scale.item()) for q in (a, b, reader)], [kind(q.zero_point.item()) for q in (a, b, reader)]
    x, y = np.arange(256, dtype=kind)[:, None], np.arange(256, dtype=kind)[None]
    p, q = s[0] / s[2], s[1] / s[2]
    if form == "zeros apart":  # as onnxruntime's kernel has it
        places = x * p + (zeros[2] - (p * zeros[0] + q * zeros[1])) + y * q
    else:
        places = (x - zeros[0]) * p + (y - zeros[1]) * q + zeros[2]
    return np.rint(places).clip(0, 255)


def test_sums_are_the_same_codes_in_every_order():
    differ = {"before": 0, "after": 0}
    rng = np.random.default_rng(0)
    for _ in range(12):
        a, b = (
            grid(float(rng.uniform(0.01, 0.05)), 114),
            grid(float(rng.uniform(0.01, 0.05)), int(rng.integers(0, 200))),
        )
        reader = grid(float(rng.uniform(0.02, 0.04)), int(rng.integers(0, 128)))
        for when in differ:
            differ[when] += sum(
                int((codes(a, b, reader, form) != codes(a, b, reader, "exact")).sum())
                for form in ("zeros apart", "in order")
            )
            if when == "before":
                clear_sums._clear("add", a, b, [reader])
    assert differ["before"] > 3 and differ["after"] == 0, differ


class Sum(nn.Module):
    """A sum whose readers lie behind operations that move its values, or beside other tensors."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.start, self.side = how, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.out = nn.LazyConv2d(4, 1)
        self(torch.zeros(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        y = F.relu(y) + self.side(y)
        y = {
            "parts": lambda: y.chunk(2, 1)[1],
            "joined": lambda: torch.cat([y, torch.sigmoid(y)], 1),
            "moved": lambda: F.pixel_shuffle(y, 2).transpose(2, 3),
            "as it is": lambda: y,
        }[self.how]()
        return self.out(y).mean((2, 3))


@pytest.mark.parametrize("how", ["parts", "joined", "moved", "as it is"])
def test_readers_are_found_where_the_sum_has_moved(how, quantize):  # noqa: F811
    torch.manual_seed(0)
    model, images = quantize(Sum(how), rules=INT8)
    readers = clear_sums._readers(model, facts(model, images[:1]), "add", set())
    assert model.out.site("input") in readers
