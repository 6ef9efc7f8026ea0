"""Rounding to integers by name, with the straight-through gradient."""

import torch
from torch import Tensor

from .. import check
from ..layout import like, wide
from ..library import define, differentiable
from . import reference


def _forward(x: Tensor, rounding: str, noise: Tensor | None) -> Tensor:
    return like(reference.round_to(wide(x), rounding, noise), x)


define("round_to(Tensor x, str rounding, Tensor? noise) -> Tensor", _forward, lambda x, *_: torch.empty_like(x))
_run = differentiable("round_to", lambda ctx, inputs, output: None, lambda ctx, grad: (grad, None, None))


def round_to(x: Tensor, rounding: str = "half_even", generator: torch.Generator | None = None) -> Tensor:
    """Returns `x` rounded to integers; the gradient passes straight through.

    Computed in float32 (float64 for a float64 `x`), returned in the dtype of `x`. NaN and infinities stay.

    Args:
        x: Any shape and layout.
        rounding: `half_even`, `half_up`, `half_away`, `floor`, `trunc`, or `stochastic`: `floor(x + u)` with `u`
            uniform in [0, 1).
        generator: Source of the random numbers of `stochastic`.
    """
    check.tensor("x", x)
    return _run(x, rounding, check.noise(rounding, x, generator))
