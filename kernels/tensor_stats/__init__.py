"""Statistics of a tensor for calibration, in one pass over it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import constant, define
from . import reference


class Stats(NamedTuple):
    """Sums over a tensor ([1]) or over each channel ([C]), in float64; the histogram is int64.

    `sum_cubes`, `sum_fourths`: third and fourth powers. `positives`, `sum_positive`, `sum_positive_squares`: over values above zero.
    """

    count: Tensor
    zeros: Tensor
    nonfinite: Tensor
    minimum: Tensor
    maximum: Tensor
    sum: Tensor
    sum_squares: Tensor
    sum_cubes: Tensor
    sum_fourths: Tensor
    sum_absolute: Tensor
    positives: Tensor
    sum_positive: Tensor
    sum_positive_squares: Tensor
    sum_deviation: Tensor
    histogram: Tensor


def _fake(x, axis, center, first, width, bins, powers):
    channels = 1 if axis is None else x.shape[axis]
    return x.new_empty((14, channels), dtype=torch.float64), x.new_empty((channels, bins), dtype=torch.int64)


define(
    "tensor_stats(Tensor x, int? axis, Tensor? center, Tensor? first, Tensor? width, int bins, bool powers) "
    "-> (Tensor, Tensor)",
    reference.forward,
    _fake,
)
constant("tensor_stats")


def tensor_stats(
    x: Tensor,
    *,
    axis: int | None = None,
    center: Tensor | None = None,
    first: Tensor | None = None,
    width: Tensor | None = None,
    bins: int = 0,
    powers: bool = True,
) -> Stats:
    """Returns counts, minimum, maximum, sums of powers, the sum of |x - center| and a histogram, from one pass.

    Values are taken in float32 and summed in float64. NaN reaches the minimum, the maximum and the sums. An empty
    tensor has minimum inf and maximum -inf. The histogram's edges lie at multiples of `width`: it counts finite values
    that are not exactly zero (`zeros` has those) in bin `floor(x / width) - first`, values beyond count in the first and
    the last bin. With a width that is a power of two, nothing is rounded.

    Args:
        x: Any shape and layout.
        axis: The channel axis; None = the whole tensor.
        center: Point from which deviations are measured (default 0), one element or one per channel.
        first: Number of the first bin, a whole number: its lower edge is `first * width`; one element or one per channel.
        width: Width of a bin, > 0, one element or one per channel.
        bins: Number of bins; 0 = no histogram ([C, 0]).
        powers: False for a second pass over a tensor whose mean and range are known: it computes only `count`, `sum_deviation` (which
            needs `center`) and `histogram`; the other sums are 0, the minimum inf and the maximum -inf.
    """
    check.tensor("x", x)
    x = x.detach()
    axis = check.channel_axis(axis, x)
    if bins < 0 or (bins > 0 and (first is None or width is None)):
        raise KernelError(
            f"bins: got {bins}, first={first}, width={width}, expected bins >= 0 and both of the others where bins > 0"
        )
    if not powers and center is None:
        raise KernelError("center: got None, expected a tensor where powers=False")
    center = None if center is None else check.parameter("center", center, x, axis).detach()
    first = check.parameter("first", first, x, axis).detach() if bins else None
    width = check.parameter("width", width, x, axis, positive=True).detach() if bins else None
    moments, histogram = torch.ops.qexp.tensor_stats(x, axis, center, first, width, int(bins), powers)
    return Stats(*moments.unbind(0), histogram)
