"""An integer program with its links to the network it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from qexp.integer.op import Op
from qexp.integer.program import IntegerProgram, Requantize
from qexp.integer.values import Value


@dataclass(frozen=True)
class Place:
    """Where the network's tensor has its batch, which the program's tensor has first.

    Attributes:
        batch: The dimension.
        lead: How many dimensions of an image it holds besides (`[N * windows, ...]`: 1).
    """

    batch: int = 0
    lead: int = 0

    def inside(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor of the network as the program has it: `[N, *shape]`."""
        x = x.movedim(self.batch, 0) if self.batch else x
        return x if x.shape[1:] == shape else x.reshape(-1, *shape)

    def outside(self, x: Tensor, like: Tensor) -> Tensor:
        """Returns a tensor of the program as the network has it, in the shape of another one."""
        return x.reshape(like.movedim(self.batch, 0).shape).movedim(0, self.batch)


@dataclass(frozen=True)
class Site:
    """The program's treatment of one tensor of a layer, for the simulation: a float `x` becomes codes of `tensor`.

    Attributes:
        tensor: The program's tensor that holds the codes.
        arriving: The value before: `x = (code - zero) * unit`; None for images, which the quantizer itself encodes.
        op: The requantization; None if the tensor is on its grid already.
        leaving: The value after.
        quantized: Whether the network has a quantizer there; otherwise the tensor is float in the ordinary simulation.
        place: Where the network has the batch.
    """

    tensor: str
    arriving: Value | None
    op: Requantize | None
    leaving: Value
    quantized: bool
    place: Place = Place()


@dataclass(frozen=True)
class Computed:
    """A layer that the simulation computes as the program's operation does: a root or a quotient of whole numbers.

    Attributes:
        arriving: The values before, one per operand.
        op: The operation.
        leaving: The value after.
        place: Where the network has the batch.
    """

    arriving: tuple[Value, ...]
    op: Op
    leaving: Value
    place: Place = Place()


@dataclass
class Lowered:
    """A program, and the data with which its network computes the same numbers.

    Attributes:
        program: The operations.
        sites: By (layer, site), the treatment of activations; the layer `""` is the network's result.
        constants: By layer and site, the real values (float64) of weights, biases and statistics that the integers represent.
        steps: By layer, the real value of an integer weight of 1, `[O]`.
        computed: By layer, the operations that the simulation uses in place of the layer's own computation.
    """

    program: IntegerProgram
    sites: dict[tuple[str, str], Site] = field(default_factory=dict)
    constants: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    computed: dict[str, Computed] = field(default_factory=dict)
