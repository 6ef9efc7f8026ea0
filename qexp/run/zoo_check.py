"""Repeats what an entry of the zoo claims: its golden vectors, its program, its score by simulation and by integers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.integer.arithmetic import FLOAT32
from qexp.integer.fast import Fast
from qexp.integer.files import from_json, to_json
from qexp.integer.lowering import lower
from qexp.integer.program import IntegerProgram
from qexp.integer.reference import Reference
from qexp.numerics.packed_values import Packed
from qexp.results import zoo
from qexp.run import saved_network, training
from qexp.run.datasets import load_data
from qexp.run.settings import Settings, TrainerOptions
from qexp.run.zoo_golden import Golden, simulated
from qexp.tasks.base import Score

# Between processors, float sums differ in their last bits; a value beside the border of two codes then falls to the other side, and a
# few scores change by a code. A wrong weight, scale or bias moves all of them.
CLOSE = 0.05  # root mean square of the difference, as a share of the scores' own
FEW = 0.002  # share of samples whose outcome may differ, for the same reason
EVALUATION = (
    "_target_",
    "precision",
    "limit_test_batches",
    "deterministic",
)  # options of a trainer that a score depends on
SAMPLE, INTEGER = "sample", "integer"


@dataclass
class Report:
    """What a check found.

    Attributes:
        name: The entry, `zoo:NAME`.
        rows: Subject, whether it holds (None: it could not be tried) and the finding.
    """

    name: str
    rows: list[tuple[str, bool | None, str]] = field(default_factory=list)

    def add(self, what: str, holds: bool | None, text: str) -> None:
        """Adds a finding."""
        self.rows.append((what, holds, text))

    @property
    def holds(self) -> bool:
        """Whether nothing that was tried differs from the card."""
        return all(holds is not False for _, holds, _ in self.rows)

    def text(self) -> str:
        """Returns the findings as a table."""
        words = {True: "ok", False: "DIFFERS", None: "not tried"}
        wide = max(len(what) for what, _, _ in self.rows)
        return "\n".join(
            [self.name, *(f"  {what:<{wide}}  {words[holds]:<9}  {said}" for what, holds, said in self.rows)]
        )


def program_of(entry: zoo.Entry) -> IntegerProgram:
    """Returns the integer program of an entry; weights that the network's codes are too come from the network."""
    held, network = entry.arrays(zoo.CONSTANTS), entry.network()
    document = entry.program()
    for key, name in document.pop("shared").items():
        form = network[0]["packed"].get(name)
        if form is None:
            raise QexpError(f"{entry.folder / zoo.PROGRAM}: {key} refers to {name}, which the network lacks")
        held[key] = narrow(Packed.of(name, network[1], form).integers(), document, key)
    return from_json(document, held, str(entry.folder))


def narrow(integers: NDArray[np.int64], document: Mapping[str, Any], key: str) -> NDArray:
    """Returns integers in the type in which a program's document has the array `3.weight`."""
    number, _, name = key.partition(".")
    return np.ascontiguousarray(integers.astype(document["ops"][int(number)][name]["dtype"]))


def check(source: str, samples: int | None = None, whole: bool = False, folder: Path | None = None) -> Report:
    """Returns what a check of an entry found.

    Args:
        source: `zoo:NAME`.
        samples: How many of the test samples are scored; by default the sample that the card names.
        whole: Score all of them.
        folder: The folder of the zoo, where it is not the usual one.

    Raises:
        QexpError: There is no such entry, or one of its files was changed.
    """
    return of_entry(zoo.read(source, folder), samples, whole)


def of_entry(entry: zoo.Entry, samples: int | None = None, whole: bool = False) -> Report:
    """Returns what a check of an entry found, whose files have been compared with their hashes."""
    found = Report(entry.name)
    size = sum(p.stat().st_size for p in entry.folder.rglob("*") if p.is_file())
    found.add("files", True, f"{len(entry.card['files']) + 1} files of {size:,} bytes are as listed")
    model, arrays = saved_network.of_entry(entry), entry.arrays(zoo.GOLDEN)
    golden = Golden.of(arrays)
    _simulation(found, model, golden)
    program = program_of(entry) if entry.has_program else None
    if program is None:
        found.add("integers", None, f"it has no integer program: {entry.card.get('no_program')}")
    else:
        _integers(found, program, golden)
        _lowered(found, model, program, golden, entry)
    asked = samples or entry.card[SAMPLE]["n"]
    whole = whole or asked >= entry.card["score"]["n"]
    settings = sampled(entry.config(), None if whole else asked)
    try:
        data = load_data(settings.data.module)
    except QexpError as error:
        found.add("score", None, f"the images are not at hand ({error})")
        return found
    if whole:
        same = data.fingerprint() == entry.card["data"]
        found.add(
            "images", same or None, "those of the card" if same else "another copy of the data set than the card's"
        )
    for kind, network in (("simulation", None), (INTEGER, program)):
        if kind == INTEGER and program is None:
            continue
        score = scored(model, data, settings, network)
        right, n = expected(entry, arrays, kind, score.n)
        _compare(found, kind, score, right, n, entry)
    return found


def sampled(config: Mapping[str, Any], samples: int | None) -> Settings:
    """Returns the settings of an evaluation on the first test samples; None takes all that the run took."""
    if samples is None:
        return Settings.of(config)
    settings = Settings.of({**config, "max_samples": samples})
    data = settings.data
    return replace(settings, data=replace(data, module={**data.module, "max_samples": samples}))


def scored(model: nn.Module, data: DataSet, settings: Settings, program: IntegerProgram | None = None) -> Score:
    """Returns the score of a network, or of its integer program by the network's own task, on one processor whatever the run used."""
    options = {key: value for key, value in settings.trainer.options.items() if key in EVALUATION}
    trainer = TrainerOptions.of({**options, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False})
    plain = replace(settings, trainer=trainer, callbacks={})
    with tempfile.TemporaryDirectory() as scratch, computing(model, program):
        return training.evaluate(model, data, plain, "check", Path(scratch))[0]


@contextmanager
def computing(model: nn.Module, program: IntegerProgram | None) -> Iterator[None]:
    """Makes a network return what its integer program computes, inside a `with` block; with None, nothing changes."""
    if program is None:
        yield
        return
    fast = Fast(program, watched=())

    def forward(images: Tensor) -> Tensor:
        codes = fast.run(program.encode(images.float().cpu().numpy()))
        return torch.from_numpy(program.decode(codes.numpy()))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def expected(
    entry: zoo.Entry, arrays: Mapping[str, NDArray], kind: str, n: int
) -> tuple[NDArray[np.bool_] | None, Mapping[str, Any] | None]:
    """Returns what the card holds for the first `n` samples: which are right, where that is known, and else value and count."""
    right = arrays.get(f"right_{kind}")
    if right is not None and n <= entry.card["score"]["n"]:
        return np.unpackbits(right, count=entry.card["score"]["n"]).astype(bool)[:n], None
    for held in (entry.card["score"], entry.card[SAMPLE]):
        if held["n"] == n:
            return None, held if kind != INTEGER else held[INTEGER]
    return None, None


def _simulation(found: Report, model: nn.Module, golden: Golden) -> None:
    """Compares the simulated network with the golden outputs."""
    outputs = simulated(model, golden.images)
    if outputs.shape != golden.outputs.shape:
        found.add("golden, simulation", False, f"outputs {list(outputs.shape)} instead of {list(golden.outputs.shape)}")
        return
    if torch.equal(outputs, golden.outputs):
        found.add("golden, simulation", True, f"{outputs.numel()} outputs equal to the bit")
        return
    gap = float((outputs - golden.outputs).norm() / golden.outputs.norm())
    text = f"outputs differ by {100 * gap:.2g} % of their size; float sums of another processor change {100 * CLOSE:g} at most"
    found.add("golden, simulation", gap <= CLOSE, text)


def _integers(found: Report, program: IntegerProgram, golden: Golden) -> None:
    """Compares both executors of the program with the golden codes."""
    codes = program.encode(golden.images.numpy())
    for name, scores in (
        ("reference", Reference(program).run(golden.codes)),
        ("fast executor", Fast(program, watched=()).run(golden.codes).numpy()),
    ):
        wrong = int((scores != golden.scores).sum())
        text = f"{golden.scores.size} codes equal" if not wrong else f"{wrong} of {golden.scores.size} codes differ"
        found.add(f"golden, {name}", not wrong, text)
    if not np.array_equal(codes, golden.codes):
        found.add("golden, images", False, f"{int((codes != golden.codes).sum())} codes of the images differ")


def _lowered(found: Report, model: nn.Module, program: IntegerProgram, golden: Golden, entry: zoo.Entry) -> None:
    """Compares the stored program with the one that the loaded network is lowered to.

    A later qexp may choose other steps for a sum: another program, which must give the golden vectors all the same.
    """
    example = torch.zeros(entry.network()[0]["example"])
    made = lower(
        model, example, program.about, as_runtimes=Settings.of(entry.config()).method.requantize == FLOAT32
    ).program
    if to_json(made)[0]["checksum"] == to_json(program)[0]["checksum"]:
        found.add("program", True, "lowering the loaded network gives the stored one")
        return
    if not entry.card.get("program_of_network", True):
        found.add("program", None, "the stored one is that of the run: its weights' method is not stored")
        return
    scores = made.decode(Reference(made).run(made.encode(golden.images.numpy())))
    wrong = int((scores != program.decode(golden.scores)).sum())
    other = "lowering the loaded network gives another one than the stored one"
    same = f"this qexp lowers the network to other steps; all {golden.scores.size} golden scores are the same"
    found.add(
        "program", not wrong, same if not wrong else f"{other}: {wrong} of {golden.scores.size} golden scores differ"
    )


def _compare(
    found: Report,
    kind: str,
    score: Score,
    right: NDArray[np.bool_] | None,
    held: Mapping[str, Any] | None,
    entry: zoo.Entry,
) -> None:
    """Compares a score with what the card holds of the same samples."""
    measure = score.measure
    value = measure.stored(score.value)
    text = f"{measure.label} {measure.text(value)} on {score.n} samples"
    if right is None and held is None:
        found.add(kind, None, f"{text}; the card has no score of so many, use {entry.card[SAMPLE]['n']} or all")
        return
    if right is not None:
        ours = np.asarray(score.outcomes["correct"])
        off = int((ours != right).sum())
        allowed = 0 if kind == INTEGER else max(1, int(FEW * score.n))
        counts = f"{text}: {int(ours.sum())} right"
        if not off:
            found.add(kind, True, f"{counts}, sample by sample as recorded")
        else:
            found.add(kind, off <= allowed, f"{counts}, recorded {int(right.sum())}; {off} samples differ")
        return
    apart = abs(value - held["value"])
    allowed = 100 * FEW if measure.is_share else FEW * abs(held["value"])
    said = "as recorded" if not apart else f"recorded {measure.text(held['value'])}"
    found.add(kind, apart <= allowed, f"{text}, {said}")
