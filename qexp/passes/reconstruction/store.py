"""Storage for activations of the calibration images: in memory up to a limit, else in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qexp.errors import QexpError


class Samples:
    """A tensor `[N, ...]` filled from the front and read by index; images lie with their channels last, as convolutions read them.

    Args:
        base: Memory of the values, channels last where there are four dimensions.
    """

    def __init__(self, base: Tensor) -> None:
        self.base, self.filled = base, 0

    def __len__(self) -> int:
        return len(self.base)

    def add(self, x: Tensor) -> None:
        """Appends a batch."""
        self.base[self.filled : self.filled + len(x)] = x.movedim(1, -1) if x.ndim == 4 else x
        self.filled += len(x)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        x = self.base[index]
        return x.movedim(-1, 1) if x.ndim == 4 else x


class Store:
    """Allocates storage for samples: in memory up to the limit, else in a temporary file that is deleted after its last use.

    Args:
        memory_mb: Limit of the values kept in memory at one time, in MiB.
        folder: Where files go; None takes the system's temporary folder.
        device: Where samples that fit the bound are kept.
    """

    def __init__(self, memory_mb: float, folder: Path | None = None, device: torch.device | None = None) -> None:
        self.left = int(memory_mb * 2**20)
        self.folder, self.device = Path(folder or tempfile.gettempdir()), device
        self.in_memory = self.spilled = 0

    def room(self, n: int, like: Tensor) -> Samples:
        """Returns storage for `n` samples of the shape and type of a batch `[B, ...]`."""
        shape = (n, *(like.movedim(1, -1) if like.ndim == 4 else like).shape[1:])
        size = prod(shape) * 4
        if size <= self.left:
            self.left -= size
            self.in_memory += size
            return Samples(torch.empty(shape, device=self.device))
        self.spilled += size
        return Samples(self._mapped(shape, size))

    def _mapped(self, shape: Sequence[int], size: int) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise QexpError(
                f"{self.folder}: {size / 2**20:.0f} MiB of activations do not fit in memory_mb nor on the disk "
                f"({free / 2**20:.0f} MiB free); lower n_calibrate, raise memory_mb, or choose another runs_dir"
            )
        handle, name = tempfile.mkstemp(suffix=".activations", dir=self.folder)
        os.close(handle)
        tensor = torch.from_file(name, shared=True, size=prod(shape), dtype=torch.float32).reshape(tuple(shape))
        Path(name).unlink()  # the mapping lives on; nothing is left behind, however the run ends
        return tensor
