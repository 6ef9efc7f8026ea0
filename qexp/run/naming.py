"""Names of a run: the hash that names its point, and the columns of `results.csv` that describe its request."""

from __future__ import annotations

import copy
import hashlib
import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qexp.callbacks.observers import others
from qexp.errors import QexpError
from qexp.results import wording, zoo
from qexp.results.wording import PLAN
from qexp.run.settings import Schedule, Settings
from qexp.system.objects import TARGET

# keys that do not change a result: places, devices, and additions to a finished point
_NOT_CONTENT = (
    "runs_dir",
    "study",
    "kernels",
    "force",
    "verify",
    "accumulator",
    "logger",
)  # a proof is added to its point
PLACES_DATA = ("root", "pack_dir", "workers", "weights")  # not content: where images lie, and how they are decoded
# part of a point's name only where they are set
_ABSENT = {
    "rounding": "float",
    "evaluate": "float",
    "passes": {},
    "callbacks": {},
    "optimizer": None,
    "scheduler": None,
    "schedule.two_step": None,
    "schedule.sam": None,
}
_NOT_CONTENT_TRAINER = (
    "accelerator",
    "devices",
    "strategy",
    "num_nodes",
    "enable_progress_bar",
    "logger",
    "channels_last",
    "fused_norms",
    "threads",
    "nice",
)


def point_hash(settings: Settings, contents: Mapping[str, str]) -> str:
    """Returns the name of a point: a hash of the resolved configuration and of the contents it refers to (weights, data).

    Args:
        settings: The settings of the run.
        contents: Hashes that replace the values of the keys they belong to (`weights`, `schedule.distill.teacher.weights`), and hashes
            of what the configuration does not name at all (`code`, `data`).
    """
    content = copy.deepcopy(dict(settings.resolved))
    # without weights the float network is trained first, so that options of training count
    content["trainer"] = trainer_content(settings.trainer.options, settings.trains or settings.weights is None)
    content["callbacks"] = others(settings.callbacks)
    for key in _NOT_CONTENT:
        content.pop(key, None)
    for key, default in _ABSENT.items():
        node, last = _node(content, key)
        if last in node and node[last] == default:
            node.pop(last)
    for key in PLACES_DATA:
        content.get("dataset", {}).get("data", {}).pop(key, None)
    for key in contents:  # likewise a weights file, a plan
        node, last = _node(content, key)
        node.pop(last, None)
    text = json.dumps([content, contents], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _node(content: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Returns the mapping that holds a dotted key, empty where there is none, and the key's last name."""
    *above, last = key.split(".")
    for name in above:
        content = content.get(name) or {}
    return content, last


def trainer_content(trainer: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    """Returns the trainer's options that change a result.

    In training, the number of processes does: each process has a batch of its own, which changes the steps and the statistics of batch
    norms. Ranges and scores do not depend on it.
    """
    content = {key: value for key, value in trainer.items() if key not in _NOT_CONTENT_TRAINER}
    if not content.get("tf32"):
        content.pop("tf32", None)  # float32 as everywhere
    if trained and trainer.get("devices") not in (None, 1, "auto"):
        content["devices"] = trainer["devices"]
    return content


def check_study(name: str) -> None:
    """Raises if a study's name does not name a folder inside `runs_dir`."""
    parts = name.split("/")
    if not name or name.startswith("/") or {"", ".", ".."} & set(parts) or ".cache" in parts:
        raise QexpError(f"study={name!r} is not allowed; name a folder inside runs_dir, such as study=widths")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        raise QexpError(f"study={name!r} is not allowed; leave out control characters and line ends")
    if any(len(part.encode()) > 255 for part in parts):
        raise QexpError(f"study={name[:40]}...: a folder's name has at most 255 bytes; choose a shorter one")


def title(settings: Settings) -> str:
    """Returns a point's short name: `resnet20 minmax ptq W8A8`."""
    row = asked(settings)
    return f"{row['model']} {row['quant']} {row['schedule']} {wording.asked(row)}"


def asked(settings: Settings) -> dict[str, Any]:
    """Returns the columns that describe the request: model, data, method, widths and other settings."""

    def short(value: Any) -> Any:
        return value if isinstance(value, int | float | str | None) else json.dumps(value).replace('"', "")

    is_float = settings.schedule.is_float  # nothing is quantized, so the other keys do not matter
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
        "weights": weights_name(settings),
    }


def weights_name(settings: Settings) -> str:
    """Returns the name of a run's first weights in tables: a file or a run's folder, and the start of its hash.

    A name that is not a file (a torchvision one) stays as it is; of an address, the last part is returned. Without weights the
    result is the length of the float network's training, or `random` where training with quantizers starts from scratch.
    """
    source, schedule = settings.weights, settings.schedule
    if source is None:
        pretrain = schedule if schedule.is_float else None if schedule.from_scratch else schedule.pretrain
        return f"trained {pretrain.epochs} epochs" if pretrain else "random"
    text = str(source)
    if "://" in text:
        address, _, digest = text.partition("#sha256=")
        return address.rstrip("/").rsplit("/", 1)[-1] + (f"@{digest[:6]}" if digest else "")
    path = Path(text)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    try:
        state = file.stat()
        name = path.parent.parent.name if path.parent.name == "checkpoints" and path.parent.parent.name else path.name
        return f"{name}@{_short_hash(file, state.st_mtime_ns, state.st_size)}"
    except OSError:  # not a file, or an unreadable one, for which the point itself raises an error
        return text.rsplit("/", 1)[-1]


@cache
def _short_hash(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:6]


def reference_name(settings: Settings) -> str:
    """Returns the origin of `value_float` where it is not a float network's score: weights that were trained with quantizers."""
    source = settings.weights
    if source is None:
        return ""
    if zoo.name_of(source) is not None:
        return f"{source} in float"
    path = Path(str(source))
    folder = path if path.is_dir() else path.parent.parent
    try:
        made = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError, RecursionError):
        return ""
    quantized = isinstance(made, dict) and made.get("quant") not in (None, "none") and made.get("seconds_train")
    return f"{made['schedule']} weights in float" if quantized else ""


def plan_name(path: Path) -> str:
    """Returns the name of a plan in tables: its file, or the run's folder a `layers.csv` lies in, and the start of its hash."""
    name = path.parent.name if path.name == "layers.csv" and path.parent.name else path.name
    try:  # a pipe or a device is not read here; the point itself raises an error that names it
        return f"{name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:6]}" if path.is_file() else name
    except (OSError, ValueError):
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
    if schedule.sam:
        words.append("sharpness-aware")
    if schedule.two_step:
        words.append(f"two steps {schedule.two_step:g}")
    if schedule.progressive:
        widths = [schedule.progressive] if isinstance(schedule.progressive, int) else list(schedule.progressive)
        words.append("progressive " + "-".join(map(str, widths)))
    return words
