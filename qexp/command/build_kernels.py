"""Builds the kernels of a sweep before its first point."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qexp.command.sweeps import all_finished


class BuildKernels(Callback):
    """Builds the kernels before the first point of a sweep starts, so that estimates of the time left do not include the build.

    Nothing is built, and torch is not loaded, where every point finished earlier.
    The one line that the build logs is printed, since Hydra sets up logging for points only.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with contextlib.suppress(
            HydraException
        ):  # a mistake in the command line, for which the sweeper raises the error
            if all_finished(config):
                return
        import qexp_kernels  # imports torch, which finished points do not need

        asked = OmegaConf.select(config, "kernels")
        builder, printed = logging.getLogger(qexp_kernels.build.__name__), logging.StreamHandler(sys.stdout)
        level = builder.level
        builder.setLevel(logging.INFO)
        builder.addHandler(printed)
        try:
            with contextlib.suppress(qexp_kernels.KernelError):  # each point raises it as its own error
                qexp_kernels.load("auto" if asked is None else str(asked))
        finally:
            builder.removeHandler(printed)
            builder.setLevel(level)
