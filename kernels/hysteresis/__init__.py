"""One-bit weights with memory: a sign flips only when the latent weight is beyond a threshold."""

import math

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import constant, define
from . import reference

define(
    "hysteresis(Tensor latent, Tensor state, float tau) -> (Tensor, Tensor)",
    reference.forward,
    lambda latent, state, tau: (torch.empty_like(state), latent.new_empty((), dtype=torch.float32)),
)
constant("hysteresis")


def hysteresis(latent: Tensor, state: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Returns the new signs and the scale `mean|latent|` (float32, 0-dim); changes nothing in place.

    `+1` where `latent >= tau`, `-1` where `latent <= -tau`, the old sign in between. `tau = 0` is the plain sign with
    `sign(0) = +1`. A NaN weight keeps its sign (and makes the scale NaN). No gradient.

    Args:
        latent: The float weights.
        state: The signs so far (-1 or 1), the shape of `latent`, any real dtype.
        tau: Threshold, >= 0.
    """
    check.tensor("latent", latent)
    if state.shape != latent.shape:
        raise KernelError(f"state: got shape {tuple(state.shape)}, expected that of latent, {tuple(latent.shape)}")
    if state.device != latent.device:
        raise KernelError(f"state: is on {state.device}, but latent is on {latent.device}")
    if not (math.isfinite(tau) and tau >= 0):
        raise KernelError(f"tau: got {tau}, expected a finite number of at least 0")
    return torch.ops.qexp.hysteresis(latent, state, float(tau))
