"""Hypothesis strategies: tensors as quantizers meet them, ugly ones included."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = (
    "normal",
    "laplace",
    "positive",
    "relu",
    "negative",
    "ties",
    "denormal",
    "spike",
    "constant",
    "constant_negative",
    "zeros",
    "offset",
)


def values(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns a float32 tensor of one kind; the same for the same seed."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    match kind:
        case "laplace":
            x = rng.laplace(size=shape)
        case "positive":
            x = np.abs(x) + 1e-3
        case "relu":
            x = np.maximum(x, 0)
        case "negative":
            x = -np.abs(x) - 1e-3
        case "ties":
            x = rng.integers(-8, 9, shape) * 0.25
        case "denormal":
            x = x * 1e-41
        case "spike":
            x = x * 1e-3
            x.flat[rng.integers(x.size)] = 50.0
        case "constant":
            x = np.full(shape, 0.37)
        case "constant_negative":
            x = np.full(shape, -1.3)
        case "zeros":
            x = np.zeros(shape)
        case "offset":
            x = x * 1e-3 + 100.0
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@st.composite
def tensors(draw: st.DrawFn, site: str, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """Draws a weight `[O, I, k, k]` or an activation `[N, C, H, W]`; one-element channels are among them."""
    small = st.integers(1, 4)
    if site == "weight":
        k = draw(st.sampled_from((1, 3)))
        shape = (draw(small), draw(small), k, k)
    elif site == "bias":
        shape = (draw(st.integers(1, 8)),)
    else:
        shape = (draw(small), draw(small), draw(small), draw(small))
    return values(draw(st.sampled_from(kinds)), shape, draw(st.integers(0, 2**16)))
