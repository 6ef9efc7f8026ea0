"""Distributes the levels of a tensor over its channels."""

from __future__ import annotations

import torch
from torch import Tensor


def bins(spread: Tensor, bits: float) -> Tensor:
    """Returns the number of levels of each channel, float64 `[C]`: `C * 2^bits` in all, in proportion to `spread^(2/3)`.

    Args:
        spread: Standard deviation or mean absolute deviation of each channel, `[C]`.
        bits: Mean bits per channel, a whole number or not.

    Source: Banner et al. 2019 (arXiv 1810.05723), equations 10-11.

    >>> [round(b, 3) for b in bins(torch.tensor([1.0, 2.0, 4.0, 8.0]), 4).tolist()]
    [7.027, 11.155, 17.708, 28.109]
    """
    share = spread.double().clamp_min(0).pow(2 / 3)
    total = share.sum()
    share = (
        share / total if total > 0 else torch.full_like(share, 1 / len(share))
    )  # all channels are constant: share evenly
    return len(share) * 2.0**bits * share
