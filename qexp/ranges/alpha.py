"""Turns a clip alpha, around the mean or around zero, into a full or half range."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qexp.ranges.base import Context
from qexp.statistics.stats import TensorStats


def takes_half(half: Literal["auto"] | bool, stats: TensorStats, context: Context) -> bool:
    """Returns whether the range starts at zero; `auto` decides so where a ReLU follows or all values are non-negative."""
    return bool(context.followed_by_relu or (stats.min >= 0).all()) if half == "auto" else half


def rectified(stats: TensorStats) -> bool:
    """Returns whether the tensor looks like the result of a ReLU: no negative values, and some zeros."""
    return bool((stats.min >= 0).all()) and bool((stats.zeros > 0).any())


def alpha_range(
    alpha: Tensor, stats: TensorStats, half: bool, observed: tuple[Tensor, Tensor], clip_to_observed: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the range `(low, high)` `[G]` for a clip alpha: the half range, or the full range around the mean.

    Full: `low = max(observed low, mean - alpha)`, `high = low + 2 alpha`; the width is unchanged where low is raised. Half: `low = 0`,
    `high = max(mean, 0) + alpha`, so that the quantizer includes the ReLU; the statistics are those before the ReLU.

    Args:
        alpha: Distance from the mean to the end of the range, `[G]`.
        stats: Summary of the tensor.
        half: Whether to return the half range.
        observed: Least and greatest value, as extremes or averaged.
        clip_to_observed: Limit the width to the observed width.

    Source: Banner et al. 2019 (arXiv 1810.05723), as in their code.
    """
    least, greatest = observed
    if half:
        high = stats.mean.clamp_min(0) + alpha
        return torch.zeros_like(alpha), torch.minimum(high, greatest.clamp_min(0)) if clip_to_observed else high
    low = torch.maximum(least, stats.mean - alpha)
    width = torch.minimum(2 * alpha, greatest - least) if clip_to_observed else 2 * alpha
    return low, low + width


def zero_range(
    alpha: Tensor, half: bool, observed: tuple[Tensor, Tensor], clip_to_observed: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the range `(low, high)` `[G]` for a clip alpha around zero: `(-alpha, alpha)`, or the half range `(0, alpha)`.

    Args:
        alpha: Distance from zero to the end of the range, `[G]`.
        half: Whether to return the half range.
        observed: Least and greatest value, as extremes or averaged.
        clip_to_observed: Keep both ends within the observed extremes.
    """
    low, high = torch.zeros_like(alpha) if half else -alpha, alpha
    if not clip_to_observed:
        return low, high
    least, greatest = observed
    return torch.maximum(low, least.clamp_max(0)), torch.minimum(high, greatest.clamp_min(0))


def prior_range(
    alpha: Tensor, stats: TensorStats, half: bool, observed: tuple[Tensor, Tensor], clip_to_observed: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the range `(low, high)` `[G]` for a fitted prior's alpha: as `alpha_range`, but around zero for a tensor after its ReLU.

    After the ReLU the prior is centred at zero; the observed mean is that of its positive half.
    """
    if half and rectified(stats):
        return zero_range(alpha, half, observed, clip_to_observed)
    return alpha_range(alpha, stats, half, observed, clip_to_observed)
