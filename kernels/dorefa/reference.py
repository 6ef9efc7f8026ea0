"""DoReFa's weight transform in plain PyTorch."""

import torch
from torch import Tensor

from ..layout import like, wide
from ..round_to.reference import round_to


def forward(w: Tensor, levels: float, symmetric: bool, rescale: bool, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the quantized weights, in [-1, 1] or [-peak, peak], `tanh(w)`, and its largest magnitude, the peak."""
    t = torch.tanh(wide(w))
    peak = t.abs().amax() if t.numel() else t.new_zeros(())
    u = t / torch.where(peak == 0, 1.0, peak)
    steps = torch.full_like(peak, levels)  # a tensor: CUDA would multiply by the reciprocal of a number
    if symmetric:
        y = round_to(u * levels, rounding) / steps
    else:
        y = round_to((u * 0.5 + 0.5) * levels, rounding) * 2 / steps - 1
    return like(y * peak if rescale else y, w), t, peak


def backward(grad: Tensor, y: Tensor, t: Tensor, peak: Tensor, rescale: bool) -> Tensor:
    """Returns the gradient of `w`; weights that reach the peak share its gradient evenly."""
    g = wide(grad)
    to_peak = g.double() * (wide(y) - t) / peak.double() if rescale else -g.double() * t / peak.double().square()
    at_peak = t.abs() == peak
    share = to_peak.sum() / at_peak.sum()
    inner = (g if rescale else g / peak) + torch.where(at_peak, share.to(t.dtype) * t.sign(), 0)
    return like(torch.where(peak == 0, 0.0, inner * (1 - t * t)), grad)
