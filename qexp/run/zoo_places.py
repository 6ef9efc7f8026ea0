"""What a run's configuration and command say without the places of the machine it ran on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexp.errors import QexpError
from qexp.models.checkpoints import SUFFIXES
from qexp.results import zoo

LARGEST = 1 << 16  # bytes of a file that an entry takes with it
# keys of the command line that change no result
PASSING = ("runs_dir", "study", "verify", "kernels", "force", "trainer.enable_progress_bar", "export")


def portable(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Returns a configuration that names no place of this machine, and the files that an entry takes with it, by name.

    Places below `$QEXP_DATA_DIR` (or `data`) begin with that name. A small file that describes the network goes with the entry; a file
    of weights that the network would start from is left out, since the entry holds its weights.

    Raises:
        QexpError: The data set lies elsewhere.
    """
    data = os.environ.get("QEXP_DATA_DIR", "data")
    places = dict.fromkeys((data, str(Path(data).resolve()), "data"), zoo.DATA)
    files: dict[str, Path] = {}

    def of_network(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: of_network(value) for key, value in node.items()}
        if isinstance(node, list):
            return [of_network(value) for value in node]
        if not isinstance(node, str) or not _is_file(node):
            return node
        path = Path(node)
        if path.suffix in SUFFIXES:
            return None
        if path.stat().st_size > LARGEST:
            raise QexpError(f"{node}: the network is built from this file, which is too large for an entry")
        files[path.name] = path
        return f"{zoo.OWN}/{zoo.FILES}/{path.name}"

    own = {**config, "model": of_network(config["model"])}
    own["dataset"] = zoo.placed(config["dataset"], places)
    if left := _absolute(own["dataset"]):
        raise QexpError(f"{left}: the data set lies outside QEXP_DATA_DIR={data}; name its folder in QEXP_DATA_DIR")
    rest = {key: _bare(value) for key, value in own.items() if key not in ("model", "dataset")}
    return {**own, **rest, "runs_dir": "runs", "study": "zoo", "weights": None}, files


def typed(command: str) -> str:
    """Returns a run's command without its places and without keys that change no result.

    >>> typed("/home/me/run.py model=resnet20 weights=/data/net.th runs_dir=/tmp/x bits=w4a4 verify=100")
    'python run.py model=resnet20 weights=net.th bits=w4a4'
    """
    words = shlex.split(command)[1:]
    kept = [word for word in words if word.lstrip("+~").partition("=")[0] not in PASSING]
    short = []
    for word in kept:
        key, equals, value = word.partition("=")
        short.append(f"{key}{equals}{Path(value).name}" if value.startswith("/") else word)
    return " ".join(["python run.py", *map(shlex.quote, short)]) if words else ""


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


def _absolute(node: Any) -> str | None:
    """Returns the first absolute path in a configuration."""
    if isinstance(node, Mapping | list):
        parts = node.values() if isinstance(node, Mapping) else node
        return next((found for part in parts if (found := _absolute(part))), None)
    return node if isinstance(node, str) and node.startswith("/") else None


def _bare(node: Any) -> Any:
    """Returns a configuration in which absolute paths are their last names."""
    if isinstance(node, Mapping):
        return {key: _bare(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_bare(value) for value in node]
    return Path(node).name if isinstance(node, str) and node.startswith("/") else node
