"""Granularity of scales: one per tensor, per channel, or per group of neighbouring elements.

All computations per group work on *rows*: the tensor viewed as `[G, n]`, one row per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.errors import QexpError


@dataclass(frozen=True)
class Granularity:
    """Divides a tensor into groups; the elements of a group share one scale."""

    def groups(self, shape: tuple[int, ...]) -> int:
        """Returns G, the number of scales of a tensor of this shape."""
        return int(torch.Size(self.scale_shape(shape)).numel())

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a scale that broadcasts against the tensor (or, per group, against its rows)."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """Returns `x` as `[G, n]`; a view where the layout allows one."""
        raise NotImplementedError

    def reduce(self, x: Tensor, fn: Callable[..., Tensor]) -> Tensor:
        """Returns `fn(rows, dim=1)` in the shape of the scale."""
        return fn(self.rows(x), dim=1).reshape(self.scale_shape(tuple(x.shape)))

    @property
    def kind(self) -> str:
        """The name in a method's declaration: `tensor`, `channel` or `group`."""
        return str(self).partition(":")[0]

    @property
    def axis(self) -> int | None:
        """The dimension that has one scale per index; None where there is none."""
        return None


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale per tensor: `[N, C, H, W] -> []`, stored as one element `[1]`."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per index of `channel_axis`: axis 0 `[O, I, h, w] -> [O, 1, 1, 1]`, axis 1 `[N, C, H, W] -> [1, C, 1, 1]`."""

    channel_axis: int = 0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not -len(shape) <= self.channel_axis < len(shape):
            raise QexpError(
                f"granularity=channel needs dimension {self.channel_axis}, but the tensor has shape {shape}"
            )
        axis = self.channel_axis % len(shape)
        return tuple(n if d == axis else 1 for d, n in enumerate(shape))

    def rows(self, x: Tensor) -> Tensor:
        return x.movedim(self.channel_axis, 0).reshape(x.shape[self.channel_axis], -1)

    @property
    def axis(self) -> int | None:
        return self.channel_axis

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per `size` consecutive weights of an output channel: `[O, I, h, w] -> [O * I*h*w/size, 1]`."""

    size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        per_channel = int(torch.Size(shape[1:]).numel())
        if per_channel % self.size:
            raise QexpError(
                f"granularity=group:{self.size} does not divide the {per_channel} weights per channel of shape {shape}; "
                "use a divisor, or granularity=channel"
            )
        return (shape[0] * per_channel // self.size, 1)

    def rows(self, x: Tensor) -> Tensor:
        self.scale_shape(tuple(x.shape))
        return x.reshape(-1, self.size)

    def __str__(self) -> str:
        return f"group:{self.size}"


@dataclass(frozen=True)
class PerBlock(PerGroup):
    """One scale per block of a weight's elements (`blocks` blocks of equal size), for grouped transposed convolutions.

    `[I, O/g, h, w] -> [blocks, 1]`. Output channel j of one group is not output channel j of another group. One scale per index of the
    second dimension would therefore cover unrelated channels.
    """

    size: int = 0
    blocks: int = 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.blocks, 1)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(self.blocks, -1)

    @property
    def kind(self) -> str:
        return "channel"

    def __str__(self) -> str:
        return f"blocks:{self.blocks}"


def granularity(name: str | Granularity, channel_axis: int) -> Granularity:
    """Returns the granularity for a name from the configuration: `tensor`, `channel` or `group:N`.

    Args:
        name: The name in the YAML, or a Granularity.
        channel_axis: Channel axis of the tensor (weights 0, activations 1).
    """
    if isinstance(name, Granularity):
        return name
    if name == "tensor":
        return PerTensor()
    if name == "channel":
        return PerChannel(channel_axis)
    if name.startswith("group:") and name[6:].isdigit() and int(name[6:]) > 0:
        return PerGroup(int(name[6:]))
    raise QexpError(f"granularity: got {name!r}; allowed are tensor, channel, group:N")
