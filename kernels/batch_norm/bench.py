"""Times batch norm, sum and ReLU of a training step, forward and backward, against PyTorch's operations."""

import torch
from torch.nn import functional as F

from ..timing import Measure
from . import batch_norm


def measures(device: torch.device) -> list[Measure]:
    """Returns the measures for activations [128, 16, 32, 32] (eight times as many images on a GPU), channels innermost."""
    images = 1024 if device.type == "cuda" else 128
    weight, bias = (torch.rand(16, device=device, requires_grad=True) for _ in range(2))
    mean, variance = torch.zeros(16, device=device), torch.ones(16, device=device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x, g, more = (
            torch.randn(images, 16, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(3)
        )
        x.requires_grad_(), more.requires_grad_()

        def fused(x=x, g=g, more=more):
            y = batch_norm(x, weight, bias, eps=1e-5, added=more, low=0.0)[0]
            torch.autograd.grad(y, (x, weight, bias, more), g)

        def plain(x=x, g=g, more=more):
            y = F.relu(F.batch_norm(x, mean, variance, weight, bias, True) + more)
            torch.autograd.grad(y, (x, weight, bias, more), g)

        name = f"batch norm, sum and ReLU, {str(dtype).removeprefix('torch.')}"
        found.append(Measure(name, fused, "PyTorch's operations", plain, 0.8))
    return found
