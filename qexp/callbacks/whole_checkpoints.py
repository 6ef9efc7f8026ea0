"""Checkpoints written whole or not at all: a disk that fills leaves the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from qexp.system.whole_files import whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint beside its place and moves it there when it is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole(path) as part:
            torch.save(checkpoint, part)
