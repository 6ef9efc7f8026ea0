"""Who shares a scale: the whole tensor, one channel, or a group of neighbouring elements.

Everything that computes per group works on *rows*: the tensor seen as `[G, n]`, one row a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.errors import QexpError


@dataclass(frozen=True)
class Granularity:
    """How a tensor falls into groups that share one scale."""

    def groups(self, shape: tuple[int, ...]) -> int:
        """Returns G, the number of scales of a tensor of this shape."""
        return int(torch.Size(self.scale_shape(shape)).numel())

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape a scale needs to broadcast against the tensor (or, per group, against its rows)."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """Returns `x` as `[G, n]`; a view where the layout allows one."""
        raise NotImplementedError

    def reduce(self, x: Tensor, fn: Callable[..., Tensor]) -> Tensor:
        """Returns `fn(rows, dim=1)` in the shape of the scale."""
        return fn(self.rows(x), dim=1).reshape(self.scale_shape(tuple(x.shape)))

    @property
    def kind(self) -> str:
        """The word that methods declare it by: `tensor`, `channel` or `group`."""
        return str(self).partition(":")[0]

    @property
    def axis(self) -> int | None:
        """The dimension that has a scale of its own for each index, None where there is none."""
        return None


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor: `[N, C, H, W] -> []`, kept as one element `[1]`."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of `channel_axis`: axis 0 `[O, I, h, w] -> [O, 1, 1, 1]`, axis 1 `[N, C, H, W] -> [1, C, 1, 1]`."""

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
    """One scale for every `size` consecutive weights of an output channel: `[O, I, h, w] -> [O * I*h*w/size, 1]`."""

    size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        per_channel = int(torch.Size(shape[1:]).numel())
        if per_channel % self.size:
            raise QexpError(
                f"granularity=group:{self.size} does not divide the {per_channel} weights a channel of shape {shape}; "
                "choose a divisor, or granularity=channel"
            )
        return (shape[0] * per_channel // self.size, 1)

    def rows(self, x: Tensor) -> Tensor:
        self.scale_shape(tuple(x.shape))
        return x.reshape(-1, self.size)

    def __str__(self) -> str:
        return f"group:{self.size}"


@dataclass(frozen=True)
class PerBlock(PerGroup):
    """One scale for each of `blocks` equal runs of a weight's elements: of a transposed convolution, one per group of channels.

    `[I, O/g, h, w] -> [blocks, 1]`. Output channel j of a group is not output channel j of another, so that one scale for each index of
    the second dimension would serve channels that have nothing to do with each other.
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
    """Returns the granularity a configuration names: `tensor`, `channel` or `group:N`.

    Args:
        name: The word in the YAML, or a Granularity already made.
        channel_axis: Where the channels of this tensor lie (weights 0, activations 1).
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
