"""Times one-pass statistics against one pass over the data."""

import torch

from ..timing import Measure
from . import tensor_stats


def measures(device: torch.device) -> list[Measure]:
    """Returns moments with and without a histogram on 64 MiB (256 MiB on a GPU), against `x.sum()`."""
    size = (64 if device.type == "cuda" else 16) << 20
    x = torch.randn(size, device=device)
    width, wide = torch.full((1,), 2.0**-8, device=device), torch.full((1,), 2.0**-6, device=device)
    first, few, zero = (torch.full((1,), v, device=device) for v in (-1024.0, -256.0, 0.0))
    channels = x.view(-1, 64, 32, 32)
    last = channels.to(memory_format=torch.channels_last)

    def histogram():
        return tensor_stats(x, first=first, width=width, bins=2048)

    def by_channel(t):
        return lambda: tensor_stats(t, axis=1, first=few, width=wide, bins=512)

    return [
        Measure("tensor_stats, 2048 bins", histogram, "x.sum()", x.sum, 3),
        Measure(
            "tensor_stats, deviation and 2048 bins alone",
            lambda: tensor_stats(x, center=zero, first=first, width=width, bins=2048, powers=False),
            "x.sum()",
            x.sum,
        ),
        Measure("tensor_stats, no histogram", lambda: tensor_stats(x), "x.sum()", x.sum),
        Measure("tensor_stats, per channel, 512 bins", by_channel(channels), "x.sum()", x.sum),
        Measure("tensor_stats, per channel, 512 bins, channels_last", by_channel(last), "x.sum()", x.sum),
        Measure(
            "tensor_stats, per channel, no histogram, channels_last",
            lambda: tensor_stats(last, axis=1),
            "x.sum()",
            x.sum,
        ),
    ]
