"""Sums of two 8-bit tensors are the same code in float32 however a runtime orders its operations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from qexp.passes import clear_sums


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
