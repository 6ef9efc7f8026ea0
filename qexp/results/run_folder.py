"""The folder of one point: its request and its results; files are written whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qexp.errors import QexpError
from qexp.system.locks import locked
from qexp.system.whole_files import write_bytes, write_text

log = logging.getLogger(__name__)


class Record:
    """Writes one point's folder.

    Args:
        folder: `<runs_dir>/<study>/<point>`.
        request: Hash of the request alone (no file contents). A failed row is dropped once a run of the same request succeeds, also if a
            file was missing or damaged before.
        about: What `environment.json` records of this point besides the versions and the machine: its weights, its code.
    """

    def __init__(self, folder: Path, request: str = "", about: Mapping[str, Any] | None = None) -> None:
        self.folder, self.request, self.about = folder, request, dict(about or {})
        # set once the request is known to be valid: later failures are not mistakes in the request
        self.checked = False
        self._log: logging.Handler | None = None

    def locked(self, title: str) -> AbstractContextManager[None]:
        """Keeps other processes from this point inside the block; a process that has to wait logs it."""
        return locked(self.folder, lambda: log.info("%s: another process is at it; waiting for its result", title))

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.json"

    def finished(self) -> dict[str, Any] | None:
        """Returns the metrics of a finished point; None where it is not finished or its file is damaged."""
        try:
            metrics = json.loads(self.metrics_path.read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return metrics if isinstance(metrics, dict) and metrics.get("status") == "ok" else None

    def open(self, config: str, start_over: bool = False) -> None:
        """Makes the folder, writes the resolved configuration and the environment, and starts the log.

        A point that is run again continues its log, after a line that marks the new run.

        Args:
            config: The resolved configuration, as YAML.
            start_over: Start an empty log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path.unlink(missing_ok=True)  # a run killed half-way must not look finished
        for part in self.folder.glob(".*.part"):  # partial files of a killed run
            part.unlink(missing_ok=True)
        self.write("config.yaml", config)
        self.write("environment.json", json.dumps(environment() | self.about, indent=1))
        path = self.folder / "log.txt"
        goes_on = path.exists() and not start_over
        self._log = logging.FileHandler(path, mode="a" if goes_on else "w")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if goes_on:  # for readers of the file only
            words = "run again; the lines of an earlier process are above"
            self._log.emit(log.makeRecord(log.name, logging.INFO, __file__, 0, words, (), None))
        logging.getLogger().addHandler(self._log)
        if logging.getLogger("qexp").level == logging.NOTSET:  # in a notebook, only warnings are on by default
            logging.getLogger("qexp").setLevel(logging.INFO)

    def start_over(self) -> None:
        """Removes the checkpoints of an earlier run of this point, so that training does not resume from its end."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def close(self) -> None:
        """Ends the log."""
        if self._log is not None:
            logging.getLogger().removeHandler(self._log)
            self._log.close()
            self._log = None

    def write(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        write_text(self.folder / name, text)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a binary file whole or not at all."""
        write_bytes(self.folder / name, content)

    def metrics(self, metrics: dict[str, Any]) -> None:
        """Writes `metrics.json`: the last file of a point, whose presence marks it as finished."""
        self.write("metrics.json", json.dumps(_plain(metrics | {"request": self.request}), indent=1))
        if metrics["status"] == "ok":
            shutil.rmtree(self.folder.parent / f"failed-{self.request}", ignore_errors=True)

    def failed(self, row: Mapping[str, Any], error: BaseException) -> dict[str, Any]:
        """Writes and returns the metrics of a point that failed, with its error; the traceback goes into `log.txt`.

        If this cannot be written either (a full disk), an error is logged, and the next run of the point starts from nothing.
        """
        metrics = {
            "status": "failed",
            "error": f"{'QexpError' if isinstance(error, QexpError) else type(error).__name__}: {error}",
            **row,
            "point": self.folder.name,
            **({"mistake": True} if isinstance(error, QexpError) and not self.checked else {}),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.txt").open("a") as file:
                file.write("".join(traceback.format_exception(error)))
            self.metrics(metrics)
        except OSError as full:
            log.error("%s: the failure could not be recorded: %s", self.folder, full)
        return metrics


@cache
def environment() -> dict[str, Any]:
    """Returns the versions and the machine a result came from."""
    packages = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy", "safetensors", "qexp")
    return {
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "commit": commit(),
        "command": " ".join(map(shlex.quote, sys.argv)),
    }


@cache  # cached: the code that this process has loaded does not change
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
    """Returns the most memory this process has held so far, in MiB; in a sweep, this includes earlier points."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)


def version_of(name: str) -> str:
    """Returns the version of an installed distribution; empty where it is not installed."""
    try:
        return version(name)
    except ModuleNotFoundError:  # importlib's PackageNotFoundError
        return ""


def _plain(value: Any) -> Any:
    """Returns the value in a form for JSON: without NaN, infinity, numpy and torch scalars."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
