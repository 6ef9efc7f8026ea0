"""Times the backward pass of LSQ, with the scale's gradient, against copies."""

import torch

from ..timing import Measure


def measures(device: torch.device) -> list[Measure]:
    """Returns the backward pass on 64 MiB (256 MiB on a GPU); it reads two tensors and writes one."""
    size = (64 if device.type == "cuda" else 16) << 20
    x, g = torch.randn(size, device=device), torch.randn(size, device=device)
    scale, scales = torch.full((1,), 0.1, device=device), torch.rand(64, device=device) + 0.1
    last_x, last_g = (t.view(-1, 64, 32, 32).to(memory_format=torch.channels_last) for t in (x, g))
    copied = torch.empty(size * 3 // 2, device=device)

    def backward():
        return torch.ops.qexp.lsq_backward(g, x, scale, None, -8.0, 7.0, None, None, "half_even", 1.0)

    def backward_channels():
        return torch.ops.qexp.lsq_backward(last_g, last_x, scales, None, -8.0, 7.0, None, 1, "half_even", 1.0)

    return [
        Measure("lsq backward", backward, "clone that moves as many bytes", copied.clone, 1.5),
        Measure("lsq backward", backward, "clone of x (two thirds of the bytes)", x.clone),
        Measure(
            "lsq backward, per channel, channels_last",
            backward_channels,
            "clone that moves as many bytes",
            copied.clone,
        ),
    ]
