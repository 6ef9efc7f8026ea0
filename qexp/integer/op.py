"""The base of the integer program's operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation: `inputs` are tensors, `output` is the tensor it makes; `layer` names its layer in the network."""

    kind: ClassVar[str] = ""
    layer: str
    inputs: tuple[str, ...]
    output: str
