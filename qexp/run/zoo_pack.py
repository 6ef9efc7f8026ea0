"""Makes an entry of the zoo from a finished run, proves it, and puts it in its place whole or not at all."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn

from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.integer.files import to_json
from qexp.integer.program import IntegerProgram
from qexp.integer.reference import Reference
from qexp.models.packed_state import arrays_of, unpacked
from qexp.numerics.packed_values import Packed
from qexp.passes.base import PassContext
from qexp.recipe.plan import Plan
from qexp.recipe.stored_weights import store_weights
from qexp.results import zoo
from qexp.results.run_folder import Record
from qexp.run import integer_proof, saved_network, zoo_check
from qexp.run.datasets import load_data
from qexp.run.experiment import Experiment
from qexp.run.settings import Settings
from qexp.run.zoo_golden import made_up, simulated
from qexp.run.zoo_places import portable, typed
from qexp.system.whole_files import write_text
from qexp.tasks.base import Score

log = logging.getLogger(__name__)
SAMPLE = 500  # test samples of the default check
PASSING = ("seconds_", "peak_mb", "request", "study", "verify", "accumulator", "package_", "onnx_", "fpga_", "torch_")


def add(
    run: Path,
    name: str,
    folder: Path,
    published: Mapping[str, Any] | None = None,
    sample: int = SAMPLE,
    command: str | None = None,
) -> zoo.Entry:
    """Returns the new entry of a finished run; an entry of this name is replaced once the new one is proved.

    Args:
        run: The run's folder.
        name: The entry's name: lower-case letters, digits, `_` and `-`.
        folder: The folder of the zoo.
        published: `{source, value}` of the published row beside it; None where there is none.
        sample: Test samples of the default check.
        command: The command that made the run, where its record has none.

    Raises:
        QexpError: The run is not finished or no longer gives its recorded score, its network cannot be stored, or a proof fails; nothing
            is written then.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise QexpError(f"{name!r} is not allowed as a name; use lower-case letters, digits, _ and -")
    record = Record(run)
    row = record.finished()
    if row is None:
        raise QexpError(f"{run}: this run is not finished (the status in its metrics.json is not ok)")
    place = folder / f".{name}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        _write(place, name, run, record, row, published, sample, command)
        entry = zoo.checked(place)
        report = zoo_check.of_entry(entry)
        log.info("%s", report.text())
        if not report.holds:
            raise QexpError(f"{name}: the entry does not give what its card says:\n{report.text()}")
        shutil.rmtree(folder / name, ignore_errors=True)
        place.rename(folder / name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    list_files(folder)
    return zoo.read(name, folder)


def publish(name: str, folder: Path, published: Mapping[str, Any] | None) -> zoo.Entry:
    """Returns an entry after writing the published row beside it on its card; all else stays.

    Args:
        name: The entry.
        folder: The folder of the zoo.
        published: `{source, value}`; None takes the row away.
    """
    entry = zoo.read(name, folder)
    write_text(entry.folder / zoo.CARD, json.dumps({**entry.card, "published": published}, indent=1) + "\n")
    list_files(folder)
    return zoo.read(name, folder)


def list_files(folder: Path) -> None:
    """Writes `SHA256SUMS` of all entries; those that were listed keep their hashes, so that a changed file is not listed as right."""
    before = zoo.sums(folder) if (folder / zoo.SUMS).exists() else {}
    rows = {}
    for name in zoo.names(folder):
        card = json.loads((folder / name / zoo.CARD).read_text())
        now = {zoo.CARD: zoo.sha256(folder / name / zoo.CARD), **card["files"]}
        rows |= {f"{name}/{file}": said for file, said in now.items()}
    changed = [n for n in before if n in rows and before[n] != rows[n]]
    if changed:
        log.info("entries made anew: %s", ", ".join(sorted({n.split("/")[0] for n in changed})))
    write_text(folder / zoo.SUMS, "".join(f"{said}  {name}\n" for name, said in sorted(rows.items())))


def _write(
    place: Path,
    name: str,
    run: Path,
    record: Record,
    row: Mapping[str, Any],
    published: Mapping[str, Any] | None,
    sample: int,
    command: str | None,
) -> None:
    """Writes all files of an entry into a folder."""
    about, _ = saved_network.saved(run)
    model = saved_network.load(run)
    config, files = portable(saved_network.config_of(run))
    for file, source in files.items():
        (place / zoo.FILES).mkdir(exist_ok=True)
        shutil.copyfile(source, place / zoo.FILES / file)
    (place / zoo.CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000))
    settings = Settings.of(zoo.Entry(place, {}).config())
    data = load_data(settings.data.module)
    images, shades = made_up(data)
    before = simulated(model, images)
    program, why = _program(settings, data, record, model)
    plan, steps = store_weights(model, saved_network.plan_of(about))
    if not torch.equal(simulated(model, images), before):
        raise QexpError(f"{run}: its weights cannot be stored by their codes; another network would be loaded")
    about, arrays = _network(model, plan, about, steps)
    (place / zoo.NETWORK).write_bytes(zoo.compressed(save({**arrays, "about": zoo.as_array(about)})))
    if program is not None:
        _write_program(place, program, about, arrays)
    tensors = saved_network.with_aliases(unpacked(about, arrays), about)
    loaded = saved_network.restored(zoo.Entry(place, {}).config(), about, tensors, place / zoo.NETWORK)
    golden = {**shades, "outputs": simulated(loaded, images).numpy()}
    if program is not None:
        golden["codes"] = program.encode(images.numpy()).astype(np.int32)
        golden["scores"] = Reference(program).run(golden["codes"].astype(np.int64))
    scores, right = _scores(loaded, settings, program, sample)
    _as_recorded(run, row, settings, scores)
    (place / zoo.GOLDEN).write_bytes(
        zoo.compressed(save({k: np.ascontiguousarray(v) for k, v in {**golden, **right}.items()}))
    )
    card = _card(name, row, record, settings, data, scores, command) | {"published": dict(published or {}) or None}
    if program is None:
        card["no_program"] = why
    else:
        card["program_of_network"] = _same_program(settings, data, record, loaded, program)
    card["weight_bytes"] = row.get("weight_bytes")
    card["files"] = {p.relative_to(place).as_posix(): zoo.sha256(p) for p in sorted(place.rglob("*")) if p.is_file()}
    card["bytes"] = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    (place / zoo.CARD).write_text(json.dumps(card, indent=1) + "\n")


def _lowered(settings: Settings, data: DataSet, record: Record, model: nn.Module) -> IntegerProgram:
    run = Experiment(settings, data, record, model, PassContext(None, [], {}, folder=record.folder))
    return integer_proof.lowered(run).program


def _program(
    settings: Settings, data: DataSet, record: Record, model: nn.Module
) -> tuple[IntegerProgram | None, str | None]:
    """Returns the integer program of a network, or else the reason why it has none."""
    try:
        return _lowered(settings, data, record, model), None
    except QexpError as error:
        return None, str(error)


def _same_program(settings: Settings, data: DataSet, record: Record, model: nn.Module, program: IntegerProgram) -> bool:
    """Returns whether lowering the stored network gives the program of the run."""
    made, _ = _program(settings, data, record, model)
    return made is not None and to_json(made)[0]["checksum"] == to_json(program)[0]["checksum"]


def _network(
    model: nn.Module, plan: Plan, about: Mapping[str, Any], steps: Mapping[str, Tensor | None]
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Returns the description of a network and the arrays that hold its tensors."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    stored, aliases = saved_network.without_aliases(state)
    arrays, codes = arrays_of(stored, steps)
    changed = {"weights": None, "kept": {}, "aliases": aliases, "packed": codes, "plan": saved_network.rows_of(plan)}
    return {**about, **changed}, arrays


def _write_program(
    place: Path, program: IntegerProgram, about: Mapping[str, Any], arrays: Mapping[str, NDArray]
) -> None:
    """Writes a program's two files; weights that are the network's own codes are named instead of stored."""
    document, constants = to_json(program)
    shared = {}
    for number, op in enumerate(program.ops):
        key, name = f"{number}.weight", f"{op.layer}.weight"
        if key in constants and name in about["packed"]:
            integers = Packed.of(name, arrays, about["packed"][name]).integers()
            if integers is not None and np.array_equal(integers, constants[key]):
                shared[key] = name
                del constants[key]
    (place / zoo.PROGRAM).write_bytes(zoo.compressed(json.dumps({**document, "shared": shared}).encode()))
    (place / zoo.CONSTANTS).write_bytes(zoo.compressed(save(constants)))


def _scores(
    model: nn.Module, settings: Settings, program: IntegerProgram | None, sample: int
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Returns the scores on all test samples and on the first few, by simulation and integers, and the arrays of right samples."""
    kinds = {"simulation": None} | ({} if program is None else {zoo_check.INTEGER: program})
    few_settings = zoo_check.sampled(settings.resolved, sample)
    found: dict[str, Any] = {"score": {}, zoo_check.SAMPLE: {}}
    right = {}
    for kind, network in kinds.items():
        full = zoo_check.scored(model, load_data(settings.data.module), settings, network)
        few = full
        if sample < full.n:
            few = zoo_check.scored(model, load_data(few_settings.data.module), few_settings, network)
        for key, score in (("score", full), (zoo_check.SAMPLE, few)):
            if kind == zoo_check.INTEGER:
                found[key][kind] = _numbers(score)
            else:
                found[key] |= _numbers(score)
        outcome = [np.asarray(s.outcomes["correct"]) if "correct" in s.outcomes else None for s in (full, few)]
        if outcome[0] is not None and np.array_equal(outcome[0][: few.n], outcome[1]):
            right[f"right_{kind}"] = np.packbits(outcome[0])
    return found, right


def _numbers(score: Score) -> dict[str, Any]:
    measure = score.measure
    low, high = (measure.stored(end) for end in (score.low, score.high))
    numbers = {"value": measure.stored(score.value), "ci_low": low, "ci_high": high, "interval": score.interval}
    return {**measure.columns(), **numbers, "n": score.n}


def _as_recorded(run: Path, row: Mapping[str, Any], settings: Settings, scores: Mapping[str, Any]) -> None:
    """Raises if the stored network has another score than its run."""
    held = scores["score"]
    if settings.integers.rounding == "integer":
        held = held.get(zoo_check.INTEGER, held)
    apart = abs(held["value"] - row["value"])
    allowed = zoo_check.FEW * (100 if row.get("is_share", True) else abs(row["value"]))
    said = f"the record has {row['metric']} {row['value']:g} on {row['n_eval']} samples, its network gives {held['value']:g} on {held['n']}"
    if apart > allowed or held["n"] != row["n_eval"]:
        raise QexpError(f"{run}: {said} here; run the point again with this code (force=true), then add it")
    if apart > 1e-9:
        log.info("%s here: float sums of another device (%s); the card has the latter", said, row.get("device"))


def _card(
    name: str,
    row: Mapping[str, Any],
    record: Record,
    settings: Settings,
    data: DataSet,
    scores: Mapping[str, Any],
    command: str | None,
) -> dict[str, Any]:
    """Returns what the card says besides hashes and program."""
    environment = json.loads((record.folder / "environment.json").read_text())
    command = command or typed(environment.get("command", ""))
    if not command:
        raise QexpError(f"{record.folder}: environment.json holds no command; give it with --command")
    method = {key: row.get(key) for key in ("quant", "schedule", "layer_wbit", "layer_abit", "ends_bit", "bn")}
    measured = {key: row.get(key) for key in ("value_float", "mean_wbit", "mean_abit", "quantized_macs", "params")}
    kept = {key: value for key, value in row.items() if not key.startswith(PASSING)}
    return {
        "format": zoo.FORMAT,
        "version": zoo.VERSION,
        "name": name,
        "model": settings.network.name,
        "dataset": settings.data.name,
        **method,
        "command": command,
        "weights": row.get("weights"),
        "seed": settings.seed,
        "commit": environment.get("commit", ""),
        "torch": environment.get("packages", {}).get("torch", ""),
        **scores,
        **measured,
        "data": data.fingerprint(),
        "row": kept,
    }
