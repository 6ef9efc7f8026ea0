"""A run's integers: the network evaluated with integer rounding, and the proof that its integer program computes the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qexp import takeaway
from qexp.errors import QexpError
from qexp.integer.accumulator import study
from qexp.integer.arithmetic import FLOAT32
from qexp.integer.ends import preprocessing
from qexp.integer.files import load, save, to_json
from qexp.integer.lowering import Lowered, lower
from qexp.integer.simulate import integer_rounding
from qexp.integer.verify import Verdict, verify
from qexp.layers.swap import baked_weights
from qexp.record import Record, asked
from qexp.takeaway import first

log = logging.getLogger(__name__)
ROUNDINGS = ("float", "integer")
FAR = 2.0  # percent of codes that real and integer scales may round differently before it is worth a warning
KEPT = ("verify", "accumulator", *(f"{form}_" for form in takeaway.FORMS))  # columns of proofs and exports


def rounding(cfg: DictConfig, model: nn.Module, data: LightningDataModule) -> AbstractContextManager[None]:
    """Inside, the network rounds as the run asks: `rounding=integer` as its integer program, else with real scales."""
    if cfg.rounding not in ROUNDINGS:
        raise QexpError(f"rounding={cfg.rounding!r}; allowed are {', '.join(ROUNDINGS)}")
    if cfg.rounding == "float":
        return nullcontext()
    return integer_rounding(model, lowered(cfg, model, data))


def lowered(cfg: DictConfig, model: nn.Module, data: LightningDataModule) -> Lowered:
    """Returns the network's integer program."""
    about = {k: v for k, v in asked(cfg).items() if k != "study"} | {"preprocessing": preprocessing(data)}
    return lower(model.cpu(), data.example(), about, as_runtimes=cfg.quant.get("requantize") == FLOAT32)


def check(cfg: DictConfig, model: nn.Module, data: LightningDataModule) -> None:
    """Raises, before the network is trained or evaluated, where a proof that the run asks for cannot be had: the lowering is tried."""
    if (cfg.verify or cfg.rounding == "integer") and cfg.export not in takeaway.OF_NETWORK:
        home = next((p.device for p in model.parameters()), None)
        lowered(cfg, model, data)
        model.to(home)


def prove(
    cfg: DictConfig, model: nn.Module, data: LightningDataModule, record: Record, value: float, images: Sequence[Tensor]
) -> dict[str, Any]:
    """Returns what the record says of integers: how the network was rounded, what a proof found, what an export wrote.

    A proof writes `integer.csv` and the program (`integer/`). What earlier exports found of the same network stays in the record, and a
    proof on more images than this one does, unless this one found something else.

    Args:
        cfg: `verify`, `accumulator`, `export`.
        model: The quantized network.
        data: Its images.
        record: The run's folder.
        value: What it scored just now: as recorded, if it is the network of the earlier exports.
        images: Batches it was calibrated on.
    """
    found = {"rounding": "integer"} if cfg.rounding == "integer" else {}
    found = _earlier(record, value) | found
    program = None
    if cfg.verify and cfg.export not in takeaway.OF_NETWORK:
        program = lowered(cfg, model, data)
        with baked_weights(model):
            verdict = verify(model, program, first(data, int(cfg.verify)), progress=cfg.trainer.enable_progress_bar)
        (log.info if verdict.equal else log.warning)("%s", verdict.line())
        if verdict.share > FAR:
            worst = max(verdict.simulated, key=lambda name: verdict.simulated[name].share)
            log.warning(
                "%.1f %% of the codes are not those of the network as it was evaluated, most at %s (%.1f %%): its score is that of "
                "another network than the integers; evaluate with rounding=integer",
                verdict.share,
                worst,
                verdict.simulated[worst].share,
            )
        if _stands(found, verdict, program, record):
            log.info("the proof on %d images stays in the record", found["verify_images"])
        else:
            record.write("integer.csv", verdict.frame(program).to_csv(index=False))
            save(program.program, record.folder / "integer")
            found |= verdict.metrics()
        found |= _accumulators(cfg, program, data, record)
    if cfg.export in takeaway.FORMS:
        run = takeaway.Taken(record.folder, model, data, int(cfg.verify), images, program)
        found |= takeaway.take(cfg.export, run)
    return found


def _earlier(record: Record, value: float) -> dict[str, Any]:
    """Returns what the record holds of proofs and exports of the same network."""
    earlier = record.finished() or {}
    if earlier.get("value") != value:
        return {}
    return {k: v for k, v in earlier.items() if k.startswith(KEPT) or k in ("value_integer", "value_onnx")}


def _stands(earlier: dict[str, Any], verdict: Verdict, program: Lowered, record: Record) -> bool:
    """Whether the recorded proof says more than this one: the same of the same program, on more images."""
    held = record.folder / "integer"
    if int(earlier.get("verify_images") or 0) <= verdict.images or earlier["verify"] != verdict.metrics()["verify"]:
        return False
    try:
        return to_json(load(held))[0]["checksum"] == to_json(program.program)[0]["checksum"]
    except QexpError:  # damaged, or of another version
        return False


def _accumulators(cfg: DictConfig, program: Lowered, data: LightningDataModule, record: Record) -> dict[str, Any]:
    """Returns the accuracy with narrower accumulators, by width, where the run asks for it; writes `accumulator.csv`."""
    widths = cfg.accumulator
    if widths is None:
        return {}
    widths = [widths] if isinstance(widths, int) else list(widths)
    if not all(isinstance(w, int) and 2 <= w <= 64 for w in widths):
        raise QexpError(f"accumulator={cfg.accumulator}; allowed are widths of 2..64 bits, one or a list")
    table = study(
        program.program, lambda: first(data, int(cfg.verify)), widths, progress=cfg.trainer.enable_progress_bar
    )
    record.write("accumulator.csv", table.to_csv(index=False))
    log.info("accuracy against accumulator width (accumulator.csv):\n%s", table.round(3).to_string(index=False))
    return {"accumulator": {f"{r.bits} {r.overflow}": r.top1 for r in table.itertuples()}}
