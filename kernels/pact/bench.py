"""Times the backward pass of PACT, with the clip value's gradient, against a copy."""

import torch

from ..timing import Measure


def measures(device: torch.device) -> list[Measure]:
    """Returns the backward pass on 64 MiB (256 MiB on a GPU)."""
    size = (64 if device.type == "cuda" else 16) << 20
    x, g = torch.randn(size, device=device), torch.randn(size, device=device)
    alpha, copied = torch.ones(1, device=device), torch.empty(size * 3 // 2, device=device)

    def backward():
        return torch.ops.qexp.pact_backward(g, x, alpha, False, None)

    return [Measure("pact backward", backward, "clone that moves as many bytes", copied.clone, 1.5)]
