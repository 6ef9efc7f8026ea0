"""Training in stages: float weights first, or from wide to narrow widths; each stage starts from the previous network."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from qexp.calibration.calibrate import collect, fit, wanted
from qexp.callbacks.tracked import Tracked
from qexp.errors import QexpError
from qexp.layers.quantized import attribute
from qexp.models.weights import save_weights
from qexp.network.facts import Facts
from qexp.network.linking import link
from qexp.passes.base import Pass
from qexp.quantizers.base import Quantizer
from qexp.recipe.plan import Entry, Plan, Source, build
from qexp.run import training
from qexp.run.experiment import Experiment
from qexp.run.settings import Schedule
from qexp.system.whole_files import write_text
from qexp.tasks.base import Task
from qexp.tasks.distillation import Distillation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        bits: The narrowest width of weights and inputs; None uses the recipe's own widths.
        epochs: The number of epochs.
        float_weights: Keep weights in float; inputs have the recipe's own widths.
    """

    bits: int | None
    epochs: int
    float_weights: bool = False

    @property
    def name(self) -> str:
        """The name of the folder of its checkpoints; empty for the last stage."""
        if self.float_weights:
            return "stage-float-weights"
        return "" if self.bits is None else f"stage-{self.bits}bit"

    @property
    def words(self) -> str:
        """The stage's name in the log."""
        if self.float_weights:
            return "float weights"
        return "final bits" if self.bits is None else f"{self.bits} bits"


def stages(schedule: Schedule, plan: Plan) -> list[Stage]:
    """Returns the stages of a schedule; a plain training has one.

    `two_step` is the first stage's share of the epochs; in that stage weights stay in float.
    A list of widths shares the epochs evenly. The recipe's own widths come last and get the remainder. A mapping
    `{width: epochs}` gives the epochs of the earlier stages, and the last stage has the rest. Naming the recipe's own width at the end
    of either adds no stage.
    """
    asked = schedule.progressive
    total = schedule.epochs
    if schedule.two_step is not None:
        return _two_steps(schedule, asked)
    if not asked:
        return [Stage(None, total)]
    where = f"schedule.progressive={asked}"
    if isinstance(asked, int):
        asked = [asked]
    widths = list(asked)
    if not all(isinstance(w, int) and 1 < w <= 16 for w in widths) or widths != sorted(set(widths), reverse=True):
        raise QexpError(
            f"{where}: give falling widths of 16..2 bits, such as [8,4,3]; the recipe's own come after them"
        )
    if len(widths) > 1 and widths[-1] == min((e.bits for e in plan if _narrowed(e)), default=None):
        widths.pop()
    if schedule.max_steps > 0:
        raise QexpError(f"{where}: stages are counted in epochs; leave schedule.max_steps unset")
    epochs = [asked[w] for w in widths] if isinstance(asked, dict) else [total // (len(widths) + 1)] * len(widths)
    if not all(isinstance(e, int) and e >= 1 for e in epochs) or sum(epochs) >= total:
        raise QexpError(
            f"{where}: schedule.epochs={total} leaves too few for {len(widths) + 1} stages; each needs one whole epoch at least, "
            "so raise schedule.epochs or list fewer widths"
        )
    return [*(Stage(w, e) for w, e in zip(widths, epochs)), Stage(None, total - sum(epochs))]


def _two_steps(schedule: Schedule, progressive: Any) -> list[Stage]:
    """Returns a stage with float weights and a stage with the whole recipe.

    Source: Martinez et al. 2020 (arXiv 2003.11535); Liu et al. 2020, "ReActNet" (arXiv 2003.03488), section 5.
    """
    share, total = schedule.two_step, schedule.epochs
    where = f"schedule.two_step={share:g}"
    if progressive or schedule.max_steps > 0:
        raise QexpError(
            f"{where}: leave schedule.progressive and schedule.max_steps unset; both steps are counted in epochs"
        )
    first = round(share * total)
    if not 0 < first < total:
        raise QexpError(
            f"{where}: schedule.epochs={total} is too few: each step needs one whole epoch at least; raise schedule.epochs"
        )
    return [Stage(None, first, float_weights=True), Stage(None, total - first)]


def widened(plan: Plan, bits: int | None) -> Plan:
    """Returns the plan with weights, inputs and outputs of at least this width; wider and float ones stay unchanged."""

    def wide(entry: Entry) -> Entry:
        return (
            replace(entry, bits=bits, source=Source.STAGE, by=f"stage {bits}")
            if bits and _narrowed(entry) and entry.bits < bits
            else entry
        )

    return Plan(tuple(map(wide, plan)))


def _narrowed(entry: Entry) -> bool:
    """Returns whether stages set this tensor's width."""
    return entry.spec is not None and (entry.site in ("weight", "output") or entry.site.startswith("input"))


def check(schedule: Schedule, plan: Plan, passes: Sequence[Pass]) -> None:
    """Raises if the stages are impossible: one would change nothing, or a pass of the recipe edits fitted quantizers."""
    steps = stages(schedule, plan)
    if steps[0].float_weights and not any(e.spec is not None and e.site == "weight" for e in plan):
        raise QexpError(
            "schedule.two_step: the first step has float weights, but the recipe quantizes none; leave it out"
        )
    for earlier, later in itertools.pairwise(steps):
        if not earlier.float_weights and widened(plan, earlier.bits).entries == widened(plan, later.bits).entries:
            raise QexpError(
                f"schedule.progressive: the stage of {earlier.bits} bits changes nothing, since no tensor of the recipe is narrower; "
                f"leave it out (the recipe's widths are {sorted({e.bits for e in plan if e.spec})})"
            )
    key = "two_step" if steps[0].float_weights else "progressive"
    edits = [
        type(p).__name__
        for p in passes
        if type(p).on_statistics is not Pass.on_statistics or type(p).on_fitted is not Pass.on_fitted
    ]
    if edits and len(steps) > 1:
        raise QexpError(
            f"schedule.{key}: the recipe's passes {', '.join(edits)} edit quantizers that each stage rebuilds; "
            "use a recipe without them, or train in one stage"
        )


def train(run: Experiment, distill: Distillation | None = None) -> None:
    """Trains the calibrated model through its stages, in place; records each stage's bits, epochs and scores in the findings.

    Each stage rebuilds the quantizers whose width changes and fits them, by their own rule, on the weights and on the activations of the
    previous stage's network. Other quantizers keep their learned state. Each stage runs the schedule's whole learning-rate curve with an
    optimizer of its own. A finished stage is kept in `checkpoints/stages`, so an interrupted run continues in the stage it had reached.
    """
    settings, model, plan, folder = run.settings, run.model, run.plan, run.folder
    structure, images, seen = run.facts, run.images, run.statistics
    steps = stages(settings.schedule, plan)
    kept, measure = folder / "checkpoints" / "stages", training.task(settings, model).measure
    done: list[dict[str, Any]] = _read(kept) if len(steps) > 1 else []
    for number, stage in enumerate(steps):
        name = stage.name
        file = kept / f"{name}.safetensors"
        if number < len(done):  # finished by an earlier, interrupted run
            if number == len(done) - 1:
                _take(model, plan, structure, stage)
                model.load_state_dict(load_file(file), strict=True)
            continue
        if len(steps) > 1:
            if number:
                channelwise, collectors = wanted(model)
                seen = collect(model, images, channelwise, settings.trainer.progress, collectors, quantized=True)
            fit(model, seen, structure.followed_by_relu, only={id(q) for q in _take(model, plan, structure, stage)})
        training.seed(settings.seed)  # how many random numbers were drawn so far depends on what was cached
        module = training.task(settings, model, settings.schedule, settings.bn == "freeze", distill)
        part = training.Part(name, stage.epochs, sum(s["epochs"] for s in done), sum(s["steps"] for s in done))
        words = run.title if len(steps) == 1 else f"{run.title} ({number + 1} of {len(steps)}: {stage.words})"
        seconds = training.fit(
            module, run.data, settings, settings.schedule, words, folder, part, _observers(run, part)
        )
        done.append(
            {
                "bits": "float weights" if stage.float_weights else stage.bits,
                "epochs": stage.epochs,
                "seconds": round(seconds, 3),
            }
            | _outcome(module)
        )
        if name:
            kept.mkdir(parents=True, exist_ok=True)
            save_weights(model, file)
            _write(kept, done)
            shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
            log.info("stage %s: done, validation %s", stage.words, measure.text(measure.stored(done[-1]["validation"])))
    run.seconds["train"] = sum(stage["seconds"] for stage in done)
    run.context.findings["train_value"] = measure.stored(done[-1]["train"])
    if len(done) > 1:
        run.context.findings["stages"] = done


def _observers(run: Experiment, part: training.Part) -> list[Tracked]:
    """Returns the callback that sends the curves to the run's trackers, if it has any."""
    return [Tracked(run.trackers.log, part.steps_before)] if run.trackers.loggers else []


def _read(kept: Path) -> list[dict[str, Any]]:
    """Returns the stages that an interrupted run has finished."""
    path = kept / "done.json"
    return json.loads(path.read_text()) if path.exists() else []


def _write(kept: Path, done: list[dict[str, Any]]) -> None:
    write_text(kept / "done.json", json.dumps(done))


def _outcome(module: Task) -> dict[str, float]:
    """Returns a training's number of steps and its last scores, on training and on held-out images."""
    scores = module.trained
    return {
        "steps": scores["steps"],
        "train": round(float(scores.get(f"train_{module.metric}", float("nan"))), 5),
        "validation": round(float(scores.get(module.monitor, float("nan"))), 5),
    }


def _take(model: nn.Module, plan: Plan, structure: Facts, stage: Stage) -> list[Quantizer]:
    """Replaces, in place, the quantizers whose width differs in this stage; returns the new ones."""
    shared: dict[str, Quantizer] = {}
    fresh = []
    for entry in widened(plan, stage.bits):
        if entry.spec is None or entry.site in ("compute", "grad_output"):
            continue
        layer = model.get_submodule(entry.layer)
        old = layer.site(entry.site)
        if stage.float_weights and entry.site == "weight":
            setattr(layer, attribute("weight"), nn.Identity())
            continue
        if isinstance(old, Quantizer) and old.bits == entry.bits:
            continue
        new = build(model, entry, structure, shared).to(
            layer.weight.device if entry.site == "weight" else old.ready.device
        )
        setattr(layer, attribute(entry.site), new)
        fresh.append(new)
    link(model, structure)
    return fresh
