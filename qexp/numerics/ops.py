"""The arithmetic of quantization: one function per operation.

Each operation computes in float32 and returns the input's dtype. Ties go to the even integer unless another rounding is named. x is
divided by the scale, never multiplied by its inverse. Gradients are those of *clamp, then round*. The implementations are in
`qexp_kernels`: a PyTorch reference that defines them, and compiled forms that must agree with it.
"""

from qexp_kernels import (
    dorefa_weight_and_peak,
    fake_quantize,
    gemmlowp,
    gemmlowp_codes,
    lsq,
    mpact,
    pact,
    quantize,
    round_to,
)
from torch import Tensor

__all__ = [
    "dequantize",
    "dorefa_weight_and_peak",
    "fake_quantize",
    "gemmlowp",
    "gemmlowp_codes",
    "lsq",
    "mpact",
    "pact",
    "quantize",
    "round_to",
]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns `(codes - zero_point) * scale`, float32; scale and zero point broadcast against the codes."""
    return (codes.float() - zero_point) * scale
