"""A run's integers: the network evaluated with integer rounding, and the proof that its integer program computes the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.integer.accumulator import study
from qexp.integer.files import save
from qexp.integer.lowering import Lowered, lower
from qexp.integer.simulate import integer_rounding
from qexp.integer.verify import verify
from qexp.layers.swap import baked_weights
from qexp.record import Record, asked

log = logging.getLogger(__name__)
ROUNDINGS = ("float", "integer")


def rounding(cfg: DictConfig, model: nn.Module, data: LightningDataModule) -> AbstractContextManager[None]:
    """Inside, the network rounds as the run asks: `rounding=integer` as its integer program, else with real scales."""
    if cfg.rounding not in ROUNDINGS:
        raise QexpError(f"rounding={cfg.rounding!r}; allowed are {', '.join(ROUNDINGS)}")
    if cfg.rounding == "float":
        return nullcontext()
    return integer_rounding(model, lowered(cfg, model, data))


def lowered(cfg: DictConfig, model: nn.Module, data: LightningDataModule) -> Lowered:
    """Returns the network's integer program."""
    about = {k: v for k, v in asked(cfg).items() if k != "study"}
    return lower(model.cpu(), data.example(), about)


def prove(cfg: DictConfig, model: nn.Module, data: LightningDataModule, record: Record) -> dict[str, Any]:
    """Returns what the record says of integers: how the network was rounded, and what the proof found, if one was asked for.

    A proof writes `integer.csv` and the program (`integer/`).
    """
    rounded = {"rounding": "integer"} if cfg.rounding == "integer" else {}
    if not cfg.verify:
        return rounded
    program = lowered(cfg, model, data)
    with baked_weights(model):
        verdict = verify(model, program, _first(data, int(cfg.verify)), progress=cfg.trainer.enable_progress_bar)
    record.write("integer.csv", verdict.frame(program).to_csv(index=False))
    save(program.program, record.folder / "integer")
    (log.info if verdict.equal else log.warning)("%s", verdict.line())
    return rounded | verdict.metrics() | _accumulators(cfg, program, data, record)


def _accumulators(cfg: DictConfig, program: Lowered, data: LightningDataModule, record: Record) -> dict[str, Any]:
    """Returns the accuracy with narrower accumulators, by width, where the run asks for it; writes `accumulator.csv`."""
    widths = cfg.accumulator
    if widths is None:
        return {}
    widths = [widths] if isinstance(widths, int) else list(widths)
    if not all(isinstance(w, int) and 2 <= w <= 64 for w in widths):
        raise QexpError(f"accumulator={cfg.accumulator}; allowed are widths of 2..64 bits, one or a list")
    table = study(
        program.program, lambda: _first(data, int(cfg.verify)), widths, progress=cfg.trainer.enable_progress_bar
    )
    record.write("accumulator.csv", table.to_csv(index=False))
    log.info("accuracy against accumulator width (accumulator.csv):\n%s", table.round(3).to_string(index=False))
    return {"accumulator": {f"{r.bits} {r.overflow}": r.top1 for r in table.itertuples()}}


def _first(data: LightningDataModule, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the first so many test images and labels, in batches."""
    left = count
    for images, labels in data.test_dataloader():
        yield images[:left].to(torch.float32), labels[:left]
        left -= len(images)
        if left <= 0:
            return
