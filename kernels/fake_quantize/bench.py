"""Fake quantization against a copy of the tensor."""

import torch

from ..timing import Measure
from . import fake_quantize


def measures(device: torch.device) -> list[Measure]:
    """Returns the forward and backward pass on 64 MiB (256 MiB on a GPU) of float32."""
    size = (64 if device.type == "cuda" else 16) << 20
    x = torch.randn(size, device=device)
    one, zero = torch.full((1,), 0.1, device=device), torch.zeros(1, device=device)
    channels = x.view(-1, 64, 32, 32)
    last = channels.to(memory_format=torch.channels_last)
    scales = torch.rand(64, device=device) + 0.1

    def backward():
        return torch.ops.qexp.fake_quantize_backward(x, x, one, zero, -8.0, 7.0, None, None)

    copied = torch.empty(size * 3 // 2, device=device)
    return [
        Measure("fake_quantize, per tensor", lambda: fake_quantize(x, one, zero, -8, 7), "clone", x.clone, 1.25),
        Measure(
            "fake_quantize, per channel", lambda: fake_quantize(channels, scales, zero, -8, 7, axis=1), "clone", x.clone
        ),
        Measure(
            "fake_quantize, per channel, channels_last",
            lambda: fake_quantize(last, scales, zero, -8, 7, axis=1),
            "clone",
            x.clone,
        ),
        Measure("fake_quantize backward", backward, "clone that moves as many bytes", copied.clone),
        Measure(
            "torch.fake_quantize_per_tensor_affine",
            lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
            "clone",
            x.clone,
        ),
    ]
