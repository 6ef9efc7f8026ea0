"""What calibration needs to know of a tensor, in one pass over it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import constant, define
from . import reference


class Stats(NamedTuple):
    """Sums over a tensor ([1]) or over each channel ([C]), in float64; the histogram is int64."""

    count: Tensor
    zeros: Tensor
    nonfinite: Tensor
    minimum: Tensor
    maximum: Tensor
    sum: Tensor
    sum_squares: Tensor
    sum_deviation: Tensor
    histogram: Tensor


def _fake(x, axis, center, low, width, bins):
    channels = 1 if axis is None else x.shape[axis]
    return x.new_empty((8, channels), dtype=torch.float64), x.new_empty((channels, bins), dtype=torch.int64)


define(
    "tensor_stats(Tensor x, int? axis, Tensor? center, Tensor? low, Tensor? width, int bins) -> (Tensor, Tensor)",
    reference.forward,
    _fake,
)
constant("tensor_stats")


def tensor_stats(
    x: Tensor,
    *,
    axis: int | None = None,
    center: Tensor | None = None,
    low: Tensor | None = None,
    width: Tensor | None = None,
    bins: int = 0,
) -> Stats:
    """Returns count, zeros, non-finite values, min, max, sum, sum of squares, sum of |x - center| and a histogram.

    Values are taken in float32 and summed in float64. NaN reaches the minimum, the maximum and the sums. An empty
    tensor has minimum inf and maximum -inf. The histogram counts finite values that are not exactly zero (`zeros` has
    those) in bin `floor((x - low) / width)`, what lies beyond in the first and the last bin.

    Args:
        x: Any shape and layout.
        axis: The channel axis; None = the whole tensor.
        center: What deviations are measured from (default 0), one element or one a channel.
        low: Lower edge of the histogram, one element or one a channel.
        width: Width of a bin, > 0, one element or one a channel.
        bins: Number of bins; 0 = no histogram ([C, 0]).
    """
    check.tensor("x", x)
    x = x.detach()
    axis = check.channel_axis(axis, x)
    if bins < 0 or (bins > 0 and (low is None or width is None)):
        raise KernelError(
            f"bins: got {bins}, low={low}, width={width}, expected bins >= 0 and both edges where bins > 0"
        )
    center = None if center is None else check.parameter("center", center, x, axis).detach()
    low = check.parameter("low", low, x, axis).detach() if bins else None
    width = check.parameter("width", width, x, axis, positive=True).detach() if bins else None
    moments, histogram = torch.ops.qexp.tensor_stats(x, axis, center, low, width, int(bins))
    return Stats(*moments.unbind(0), histogram)
