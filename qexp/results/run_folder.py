"""The folder of one point: what was asked, what came out, whole files or none."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.results.wording import PLAN
from qexp.system.locks import locked

log = logging.getLogger(__name__)

# what does not change a result: where it runs and is kept, what happens on the side
_NOT_CONTENT = ("runs_dir", "study", "kernels", "callbacks", "force")
PLACES_DATA = ("root", "pack_dir", "workers", "weights")  # the images count, not where they lie, nor who decodes them
# not part of a point's name unless they are asked for
_ABSENT = {"rounding": "float", "verify": 0, "passes": {}, "schedule.two_step": None, "schedule.sam": None}
_NOT_CONTENT_TRAINER = ("accelerator", "devices", "strategy", "num_nodes", "enable_progress_bar")


def point_hash(cfg: DictConfig, contents: dict[str, str]) -> str:
    """Returns the name of a point: a hash of the resolved configuration and of the contents it refers to (weights, data).

    Args:
        cfg: The configuration.
        contents: What stands for the keys it names (`weights`, `schedule.distill.teacher.weights`), whose values are then left out.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # an interpolation that cannot be resolved: the point will fail, under this name
        content = OmegaConf.to_container(cfg, resolve=False)
    if "trainer" in content:
        # without weights the float network is trained first
        trained = trains(content) or content.get("weights") is None
        content["trainer"] = trainer_content(content["trainer"], trained)
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


def trainer_content(trainer: dict[str, Any], trained: bool) -> dict[str, Any]:
    """Returns what of a trainer's options changes a result.

    Several processes that train have a batch each: other steps and other statistics of batch norms than one has. Ranges and
    scores are the same from any number of them.
    """
    content = {key: value for key, value in trainer.items() if key not in _NOT_CONTENT_TRAINER}
    if trained and trainer.get("devices") not in (None, 1, "auto"):
        content["devices"] = trainer["devices"]
    return content


def trains(cfg: Mapping[str, Any]) -> bool:
    """Whether this point trains the network it evaluates (a float schedule without weights has done so already)."""
    schedule = cfg["schedule"]
    learns = schedule.get("optimizer") is not None and schedule["epochs"]
    return bool(learns) and (schedule["name"] != "float" or cfg["weights"] is not None)


class Record:
    """Writes one point's folder.

    Args:
        folder: `<runs_dir>/<study>/<point>`.
        request: What was asked for, as a hash without contents: a failure's row goes once a point of the same request has succeeded,
            whichever file was missing or damaged before.
    """

    def __init__(self, folder: Path, request: str = "") -> None:
        self.folder, self.request = folder, request
        self._log: logging.Handler | None = None

    def locked(self, title: str) -> AbstractContextManager[None]:
        """Inside, no other process works on this point; one that waits says so."""
        return locked(self.folder, lambda: log.info("%s: another process is at it; waiting for its result", title))

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.json"

    def finished(self) -> dict[str, Any] | None:
        """Returns the metrics of a point that was run to its end, None where it was not (or its file is damaged)."""
        try:
            metrics = json.loads(self.metrics_path.read_text())
        except (OSError, ValueError):
            return None
        return metrics if isinstance(metrics, dict) and metrics.get("status") == "ok" else None

    def open(self, cfg: DictConfig) -> None:
        """Makes the folder, writes the resolved configuration and the environment, and starts the log.

        A point that is run again goes on in its log, after a line that says so; one that is forced begins anew.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path.unlink(missing_ok=True)  # a run killed half-way must not look finished
        for part in self.folder.glob(".*.part"):  # what a killed run was writing
            part.unlink(missing_ok=True)
        self.write("config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        self.write("environment.json", json.dumps(environment(), indent=1))
        path = self.folder / "log.txt"
        goes_on = path.exists() and not cfg.force
        self._log = logging.FileHandler(path, mode="a" if goes_on else "w")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if goes_on:  # for the reader of the file alone
            words = "run again; what an earlier process said stands above"
            self._log.emit(log.makeRecord(log.name, logging.INFO, __file__, 0, words, (), None))
        logging.getLogger().addHandler(self._log)
        if logging.getLogger("qexp").level == logging.NOTSET:  # in a notebook nobody has asked for more than warnings
            logging.getLogger("qexp").setLevel(logging.INFO)

    def start_over(self) -> None:
        """Removes the checkpoints an earlier run of this point left, so that training does not resume from its end."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def close(self) -> None:
        """Ends the log."""
        if self._log is not None:
            logging.getLogger().removeHandler(self._log)
            self._log.close()
            self._log = None

    def write(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        part = self.folder / f".{name}.{os.getpid()}.part"
        try:
            part.write_text(text)
            part.replace(self.folder / name)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def metrics(self, metrics: dict[str, Any]) -> None:
        """Writes `metrics.json`: the last file of a point, whose presence says that it is finished."""
        self.write("metrics.json", json.dumps(_plain(metrics | {"request": self.request}), indent=1))
        if metrics["status"] == "ok":
            shutil.rmtree(self.folder.parent / f"failed-{self.request}", ignore_errors=True)

    def failed(self, cfg: DictConfig, error: BaseException) -> dict[str, Any]:
        """Writes and returns the metrics of a point that failed, with its error; the traceback goes into `log.txt`.

        Where even that cannot be written (a full disk), the log says so, and the next run of the point starts from nothing.
        """
        metrics = {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            **asked(cfg),
            "point": self.folder.name,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.txt").open("a") as file:
                file.write("".join(traceback.format_exception(error)))
            self.metrics(metrics)
        except OSError as full:
            log.error("%s: the failure could not be recorded: %s", self.folder, full)
        return metrics


def asked(cfg: DictConfig) -> dict[str, Any]:
    """Returns the columns that say what was asked for."""

    def short(value: Any) -> Any:
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        return plain if isinstance(plain, int | float | str | None) else json.dumps(plain).replace('"', "")

    floating = cfg.schedule.name == "float"  # nothing is quantized, whatever the other keys say
    planned = not floating and cfg.get("plan") is not None  # the plan has the last word on the widths of what it names
    return {
        "study": cfg.study,
        "model": cfg.model.name,
        "dataset": cfg.dataset.name,
        "quant": "none" if floating else " + ".join([cfg.quant.name, *extras(cfg)]),
        "schedule": cfg.schedule.name,
        "layer_wbit": 32 if floating else PLAN if planned else short(cfg.layer_wbit),
        "layer_abit": 32 if floating else PLAN if planned else short(cfg.layer_abit),
        **({"plan": plan_name(Path(cfg.plan))} if planned else {}),
        "ends_bit": 32 if floating else cfg.ends_bit,
        "bn": cfg.bn,
        "passes": "" if floating else " + ".join(passes_of(cfg)),
        "seed": cfg.seed,
    }


def plan_name(path: Path) -> str:
    """Returns what a plan is called in tables: its file, or the run's folder a `layers.csv` lies in, and the start of its hash."""
    name = path.parent.name if path.name == "layers.csv" and path.parent.name else path.name
    try:
        return f"{name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:6]}"
    except OSError:  # the point fails and says so
        return name


def passes_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns the configurations of all passes by name, in the order they run: the recipe's, then those of `passes=`."""
    both = {**(cfg.quant.get("passes") or {}), **(cfg.get("passes") or {})}
    return {name: node for name, node in both.items() if node}


def extras(cfg: DictConfig) -> list[str]:
    """Returns what is done besides the method itself, in a word each: a table's rows must tell such runs apart."""
    words = list(cfg.get("passes") or {})
    if cfg.get("search") is not None:
        words.append(str(cfg.search["_target_"]).rsplit(".", 1)[-1].lower())
        if cfg.search.get("hessian"):
            words[-1] += " by curvature"
    return [word for word in words if word != "sensitivity"] + helps(cfg.schedule)  # sensitivity changes nothing


def helps(schedule: DictConfig) -> list[str]:
    """Returns what a schedule does beyond plain training, a word or two each."""
    distill = schedule.get("distill") or {}
    words = []
    if distill.get("logits") or distill.get("features"):
        words.append("distilled" + (" with features" if distill.get("features") else ""))
        if distill.get("teacher"):
            words[-1] += f" from {distill.teacher.get('name')}"
    if schedule.get("ema") is not None:
        words.append("averaged")
    oscillation = schedule.get("oscillation") or {}
    words += [word for key, word in (("dampen", "damped"), ("freeze", "frozen")) if oscillation.get(key) is not None]
    if schedule.get("sam"):
        words.append("sharpness-aware")
    if schedule.get("two_step"):
        words.append(f"two steps {schedule.two_step:g}")
    if schedule.get("progressive"):
        widths = [schedule.progressive] if isinstance(schedule.progressive, int) else list(schedule.progressive)
        words.append("progressive " + "-".join(map(str, widths)))
    return words


@cache
def environment() -> dict[str, Any]:
    """Returns the versions and the machine a result came from."""
    packages = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy", "qexp")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "commit": commit(),
    }


@cache  # of the code this process has loaded
def commit() -> str:
    """Returns the git commit of the code, with a `+` where it was changed since; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        )
        if head.returncode:
            return ""
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=5
        )
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def peak_mb() -> float:
    """Returns the most memory this process has held so far, in MiB; in a sweep, that of the points before is in it."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # importlib's PackageNotFoundError
        return ""


def _plain(value: Any) -> Any:
    """Returns the value as JSON holds it: no NaN, no infinity, no numpy or torch scalar."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
