"""Integer rounding in evaluation, and the proof that a run's integer program computes the same codes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from qexp.errors import QexpError
from qexp.integer.accumulator import study
from qexp.integer.arithmetic import FLOAT32
from qexp.integer.ends import preprocessing
from qexp.integer.files import load, save, to_json
from qexp.integer.lowered import Lowered
from qexp.integer.lowering import lower
from qexp.integer.simulate import integer_rounding
from qexp.integer.verify import Verdict, verify
from qexp.layers.swap import baked_weights
from qexp.results.run_folder import Record
from qexp.run import exporters
from qexp.run.experiment import Experiment
from qexp.run.exporters import first
from qexp.run.naming import asked
from qexp.run.training import task
from qexp.tasks.base import Task

log = logging.getLogger(__name__)
FAR = 2.0  # percent of codes that may differ between real and integer scales without a warning
KEPT = ("verify", "accumulator", *(f"{form}_" for form in exporters.FORMS))  # columns of proofs and exports


def rounding(run: Experiment) -> AbstractContextManager[None]:
    """Makes the network round, inside the block, like its integer program (`rounding=integer`) or else with real scales."""
    if run.settings.integers.rounding == "float":
        return nullcontext()
    return integer_rounding(run.model, lowered(run))


def lowered(run: Experiment) -> Lowered:
    """Returns the network's integer program."""
    about = {k: v for k, v in asked(run.settings).items() if k != "study"} | {"preprocessing": preprocessing(run.data)}
    about |= {"pixels": True} if run.settings.method.pixels else {}
    return lower(run.model.cpu(), run.data.example(), about, as_runtimes=run.settings.method.requantize == FLOAT32)


def check(run: Experiment) -> None:
    """Raises, before training and evaluation, if the network of a run with a proof or an integer export cannot be lowered."""
    asked_for = run.settings.integers
    if (asked_for.verify or asked_for.rounding == "integer") and asked_for.export not in exporters.OF_NETWORK:
        home = next((p.device for p in run.model.parameters()), None)
        lowered(run)
        run.model.to(home)


def prove(run: Experiment, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the metrics of the integers: how the network was rounded, what the proof found, what the export wrote.

    A proof writes `integer.csv` and the program (`integer/`). Results of earlier exports of the same network stay in the record. A proof
    on more images than this one stays as well, unless this one has another result.

    Args:
        run: The run, of which the network, the images and the folder are used; nothing is evaluated.
        earlier: The record of the same network, where it is finished.
    """
    settings, model, data, record = run.settings, run.model, run.data, run.record
    found = {"rounding": "integer"} if settings.integers.rounding == "integer" else {}
    found = _earlier(earlier or {}) | found
    program, judge = None, task(settings, model)
    if settings.integers.verify and settings.integers.export not in exporters.OF_NETWORK:
        program = lowered(run)
        with baked_weights(model):
            images = first(data, settings.integers.verify)
            verdict = verify(model, program, images, progress=settings.trainer.progress, judge=judge)
        if verdict.score is None:
            log.info(
                "%s cannot score outputs alone, so the integer program has no score of its own", type(judge).__name__
            )
        (log.info if verdict.equal else log.warning)("%s", verdict.line())
        if verdict.images < settings.integers.verify and settings.integers.export is None:
            log.info(
                "verify=%d: the test set has %d images%s; all of them were compared",
                settings.integers.verify,
                verdict.images,
                f" (max_samples={settings.max_samples})" if settings.max_samples else "",
            )
        if verdict.share > FAR:
            worst = max(verdict.simulated, key=lambda name: verdict.simulated[name].share)
            log.warning(
                "%.1f %% of the codes differ from those of the network as it was evaluated, most at %s (%.1f %%): the score does not "
                "belong to the integer program; evaluate with rounding=integer",
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
        found |= _accumulators(run, program, judge)
    if settings.integers.export in exporters.FORMS:
        made_of = exporters.ExportedRun(
            record.folder, settings.network.name, model, data, settings.integers.verify, run.images, program, judge
        )
        found |= exporters.take(settings.integers.export, made_of)
    return found


def _earlier(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a record that belong to proofs and exports."""
    return {k: v for k, v in recorded.items() if k.startswith(KEPT) or k in ("value_integer", "value_onnx")}


def _stands(earlier: dict[str, Any], verdict: Verdict, program: Lowered, record: Record) -> bool:
    """Returns whether to keep the recorded proof: it has the same result for the same program, on more images."""
    held = record.folder / "integer"
    if int(earlier.get("verify_images") or 0) <= verdict.images or earlier["verify"] != verdict.metrics()["verify"]:
        return False
    try:
        return to_json(load(held))[0]["checksum"] == to_json(program.program)[0]["checksum"]
    except QexpError:  # damaged, or of another version
        return False


def _accumulators(run: Experiment, program: Lowered, judge: Task) -> dict[str, Any]:
    """Returns the score with narrower accumulators, by width, if the run has `accumulator`; writes `accumulator.csv`."""
    settings, widths = run.settings, run.settings.integers.accumulator
    if not widths:
        return {}
    table = study(
        program.program,
        lambda: first(run.data, settings.integers.verify),
        widths,
        progress=settings.trainer.progress,
        judge=judge,
    )
    run.record.write("accumulator.csv", table.to_csv(index=False))
    what = judge.measure.head if table["value"].notna().any() else "overflows (this task cannot score outputs alone)"
    log.info("%s against accumulator width (accumulator.csv):\n%s", what, table.round(3).to_string(index=False))
    known = table[table["value"].notna()]
    return {"accumulator": {f"{r.bits} {r.overflow}": r.value for r in known.itertuples()}}
