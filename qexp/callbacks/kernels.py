"""Loads the compiled kernels before the first tensor is computed."""

from __future__ import annotations

import logging

import qexp_kernels
from pytorch_lightning import Callback, LightningModule, Trainer

from qexp.errors import QexpError

log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()


def load_kernels(which: str = "auto") -> str:
    """Loads the kernels once, logs which and why in one line, and returns the implementation: cuda, cpp or reference.

    Raises:
        QexpError: An implementation was named and is not available.
    """
    try:
        loaded = qexp_kernels.load(which)
    except qexp_kernels.KernelError as error:
        raise QexpError(f"kernels={which}: {error}") from None
    if (loaded.implementation, loaded.reason) not in _said:
        _said.add((loaded.implementation, loaded.reason))
        log.info("kernels: %s (%s)", loaded.implementation, loaded.reason)
    return loaded.implementation


class LoadKernels(Callback):
    """Loads the kernels when a Trainer is set up; the pipeline already loads them before calibration.

    Args:
        which: auto, cuda, cpp or reference.
    """

    observes = True

    def __init__(self, which: str = "auto") -> None:
        self.which = which

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        load_kernels(self.which)
