"""Writes checkpoints completely or not at all: when the disk is full, the previous one stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from qexp.system.whole_files import whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint to a temporary file and renames it when it is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole(path) as part:
            torch.save(checkpoint, part)
