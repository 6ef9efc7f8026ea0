"""What a run is called: the hash that names its point, and the columns that say what was asked for."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexp.results import wording
from qexp.results.wording import PLAN
from qexp.run.settings import Schedule, Settings
from qexp.system.objects import TARGET

# what does not change a result: where it runs and is kept, what happens on the side
_NOT_CONTENT = ("runs_dir", "study", "kernels", "callbacks", "force")
PLACES_DATA = ("root", "pack_dir", "workers", "weights")  # the images count, not where they lie, nor who decodes them
_ABSENT = {"rounding": "float", "verify": 0, "passes": {}}  # not part of a point's name unless they are asked for
_NOT_CONTENT_TRAINER = ("accelerator", "devices", "strategy", "num_nodes", "enable_progress_bar")


def point_hash(settings: Settings, contents: Mapping[str, str]) -> str:
    """Returns the name of a point: a hash of the resolved configuration and of the contents it refers to (weights, data).

    Args:
        settings: Of the run.
        contents: What stands for the keys it names (`weights`, `schedule.distill.teacher.weights`), whose values are then left out.
    """
    content = copy.deepcopy(dict(settings.resolved))
    # without weights the float network is trained first
    content["trainer"] = trainer_content(settings.trainer.options, settings.trains or settings.weights is None)
    for key in _NOT_CONTENT:
        content.pop(key, None)
    for key, default in _ABSENT.items():
        if content.get(key) == default:
            content.pop(key)
    for key in PLACES_DATA:
        content.get("dataset", {}).get("data", {}).pop(key, None)
    for key in contents:  # likewise a weights file, a plan
        *above, last = key.split(".")
        node = content
        for name in above:
            node = node.get(name) or {}
        node.pop(last, None)
    text = json.dumps([content, contents], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trainer_content(trainer: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    """Returns what of a trainer's options changes a result.

    Several processes that train have a batch each: other steps and other statistics of batch norms than one has. Ranges and
    scores are the same from any number of them.
    """
    content = {key: value for key, value in trainer.items() if key not in _NOT_CONTENT_TRAINER}
    if trained and trainer.get("devices") not in (None, 1, "auto"):
        content["devices"] = trainer["devices"]
    return content


def title(settings: Settings) -> str:
    """Returns the few words that name a point: `resnet20 minmax ptq W8A8`."""
    row = asked(settings)
    return f"{row['model']} {row['quant']} {row['schedule']} {wording.asked(row)}"


def asked(settings: Settings) -> dict[str, Any]:
    """Returns the columns that say what was asked for."""

    def short(value: Any) -> Any:
        return value if isinstance(value, int | float | str | None) else json.dumps(value).replace('"', "")

    is_float = settings.schedule.is_float  # nothing is quantized, whatever the other keys say
    plan = None if is_float else settings.widths.plan  # a plan sets the widths of what it names
    return {
        "study": settings.study,
        "model": settings.network.name,
        "dataset": settings.data.name,
        "quant": "none" if is_float else " + ".join([settings.method.name, *extras(settings)]),
        "schedule": settings.schedule.name,
        "layer_wbit": 32 if is_float else PLAN if plan else short(settings.widths.weights),
        "layer_abit": 32 if is_float else PLAN if plan else short(settings.widths.inputs),
        **({"plan": plan_name(plan)} if plan else {}),
        "ends_bit": 32 if is_float else settings.widths.ends,
        "bn": settings.bn,
        "passes": " + ".join(settings.all_passes),
        "seed": settings.seed,
    }


def plan_name(path: Path) -> str:
    """Returns what a plan is called in tables: its file, or the run's folder a `layers.csv` lies in, and the start of its hash."""
    name = path.parent.name if path.name == "layers.csv" and path.parent.name else path.name
    try:
        return f"{name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:6]}"
    except OSError:  # the point fails and says so
        return name


def extras(settings: Settings) -> list[str]:
    """Returns a short label for each step besides the method itself, so that the rows of a table are distinguishable."""
    words = list(settings.passes)
    if settings.search is not None:
        words.append(str(settings.search[TARGET]).rsplit(".", 1)[-1].lower())
        if settings.search.get("hessian"):
            words[-1] += " by curvature"
    return [word for word in words if word != "sensitivity"] + helps(settings.schedule)  # sensitivity changes nothing


def helps(schedule: Schedule) -> list[str]:
    """Returns a label for each thing a schedule does beyond plain training."""
    words = []
    if schedule.distill.is_on:
        words.append("distilled" + (" with features" if schedule.distill.features else ""))
        if schedule.distill.teacher is not None:
            words[-1] += f" from {schedule.distill.teacher.name}"
    if schedule.ema is not None:
        words.append("averaged")
    oscillation = schedule.oscillation or {}
    words += [word for key, word in (("dampen", "damped"), ("freeze", "frozen")) if oscillation.get(key) is not None]
    if schedule.progressive:
        widths = [schedule.progressive] if isinstance(schedule.progressive, int) else list(schedule.progressive)
        words.append("progressive " + "-".join(map(str, widths)))
    return words
