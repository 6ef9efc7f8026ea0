"""How many levels each channel gets of those a tensor has in all."""

from __future__ import annotations

import torch
from torch import Tensor


def bins(spread: Tensor, bits: float) -> Tensor:
    """Returns how many of the `C * 2^bits` levels each of C channels gets, float64 `[C]`: shares of `spread^(2/3)`.

    Args:
        spread: Standard deviation or mean absolute deviation of each channel, `[C]`.
        bits: Bits a channel on average, whole or not.

    Source: Banner et al. 2019 (arXiv 1810.05723), equations 10-11.

    >>> [round(b, 3) for b in bins(torch.tensor([1.0, 2.0, 4.0, 8.0]), 4).tolist()]
    [7.027, 11.155, 17.708, 28.109]
    """
    share = spread.double().clamp_min(0).pow(2 / 3)
    total = share.sum()
    share = share / total if total > 0 else torch.full_like(share, 1 / len(share))  # all constant: nothing to prefer
    return len(share) * 2.0**bits * share
