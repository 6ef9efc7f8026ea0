"""DoReFa's weight transform in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import like, wide
from ..round_to.reference import round_to


def _normalized(w: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(wide(w))
    peak = t.abs().amax() if t.numel() else t.new_zeros(())
    return t, peak


def forward(w: Tensor, levels: float, symmetric: bool, rounding: str) -> Tensor:
    """Returns the quantized weights, in [-1, 1]."""
    t, peak = _normalized(w)
    t = t / torch.where(peak == 0, 1.0, peak)
    if symmetric:
        y = round_to(t * levels, rounding) / levels
    else:
        y = round_to((t * 0.5 + 0.5) * levels, rounding) * 2 / levels - 1
    return like(y, w)


def backward(grad: Tensor, w: Tensor) -> Tensor:
    """Returns the gradient through `tanh(w) / max|tanh(w)|`, shared evenly by the weights that reach the maximum."""
    t, peak = _normalized(w)
    g = wide(grad)
    at_peak = t.abs() == peak
    share = (g.double() * t).sum() / peak.double().square() / at_peak.sum()
    inner = g / peak - torch.where(at_peak, share.to(t.dtype) * t.sign(), 0)
    return like(torch.where(peak == 0, 0.0, inner * (1 - t * t)), w)
