"""A run's integers: the network evaluated with integer rounding, and the proof that its integer program computes the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.integer import onnx_file, package
from qexp.integer.accumulator import study
from qexp.integer.fast import Fast
from qexp.integer.files import save
from qexp.integer.lowering import Lowered, lower
from qexp.integer.simulate import integer_rounding
from qexp.integer.verify import verify
from qexp.layers.swap import baked_weights
from qexp.record import Record, asked

log = logging.getLogger(__name__)
GOLDEN = 8  # images of a package's golden vectors
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
    taken = takeaway(cfg, program, data, record) if cfg.export in ("package", "onnx") else {}
    return rounded | verdict.metrics() | _accumulators(cfg, program, data, record) | taken


def takeaway(cfg: DictConfig, lowered: Lowered, data: LightningDataModule, record: Record) -> dict[str, Any]:
    """Writes the package or the ONNX file into the run folder, tries it, and returns what the record says of it."""
    images = torch.cat([x for x, _ in _first(data, GOLDEN)])[:GOLDEN].numpy()
    if cfg.export == "package":
        folder = record.folder / "package"
        manifest = package.write(lowered.program, folder, images)
        found = package.check(folder)
        if found["differ"]:
            raise QexpError(f"{folder}: {found['differ']} golden scores are not the program's")
        floats = 4 * sum(int(np.prod(w["shape"])) for w in manifest["weights"])
        log.info(
            "package: %s, weights %d bytes (%.1f times smaller than float); C: %s",
            folder,
            manifest["weight_bytes"],
            floats / manifest["weight_bytes"],
            found["c"] or "no compiler at hand, not tried",
        )
        return {"package_bytes": manifest["weight_bytes"], "package_c": found["c"] or ""}
    path = record.folder / "model.onnx"
    made = onnx_file.write(lowered.program, path)
    session, fast, differ, right, seen = onnx_file.session(path), Fast(lowered.program), 0, 0, 0
    for x, labels in _first(data, int(cfg.verify)):
        theirs = session.run(None, {"images": x.contiguous().numpy()})[0].argmax(1)
        ours = fast.run(lowered.program.encode(x.numpy())).argmax(1).numpy()
        differ, seen = differ + int((theirs != ours).sum()), seen + len(x)
        right += int((theirs == labels.numpy()).sum())
    log.info(
        "onnx: %s, %d bytes; of %d predictions in onnxruntime %d differ from the integers'",
        path,
        made["bytes"],
        seen,
        differ,
    )
    return {"onnx_bytes": made["bytes"], "onnx_predictions_differ": differ, "value_onnx": 100 * right / max(seen, 1)}


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
