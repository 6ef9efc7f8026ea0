"""Sizes and numbers of windows of convolutions and pools."""

from __future__ import annotations


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Returns a size along height and width: one number is used for both."""
    return (value, value) if isinstance(value, int) else tuple(value)


def windows(shape, window, stride, padding, dilation=(1, 1), ceil: bool = False) -> tuple[int, int]:
    """Returns how many windows there are along height and width."""
    counts = []
    for n, k, s, p, d in zip(shape[1:], window, stride, padding, dilation):
        room = n + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil else room // s) + 1
        counts.append(count - 1 if ceil and (count - 1) * s >= n + p else count)
    return tuple(counts)
