"""Content hashes of the files and the code that a run's settings name: part of the names of points and of float networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.callbacks.observers import others
from qexp.results import identity, zoo
from qexp.run.settings import Network, Settings
from qexp.run.settings.checks import Spec
from qexp.system.file_hash import sha256


def contents(settings: Settings, owners: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Returns the content hashes of the files that the settings name, by their keys, and of the code they name, as `code`.

    Weights (or a run's last checkpoint) and the plan are always included; files of the network, and weights and files of a teacher,
    where there are any.

    Args:
        settings: The settings of the run.
        owners: See `identity.code`.
    """
    return {
        "weights": _content(settings.weights),
        "plan": _content(settings.widths.plan),
        **structure(settings.network),
        **_teacher(settings.schedule.distill.teacher),
        "code": identity.digest(identity.code(names(settings), owners)),
    }


def names(settings: Settings) -> list[str]:
    """Returns the dotted names of the classes and functions that the settings name; callbacks that only observe are left out."""
    return list(identity.named({**settings.resolved, "callbacks": others(settings.callbacks), "logger": {}}))


def about(settings: Settings) -> dict[str, Any]:
    """Returns the origin of a point: its weights, and the code it depends on (see `results/identity.py`)."""
    return {
        "weights": {"source": settings.weights, "sha256": _content(settings.weights)},
        "code": identity.code(names(settings)),
    }


def structure(network: Network) -> dict[str, str]:
    """Returns the content hashes of the files that define a network, by their keys."""
    own = {"cfg": _content(network.definition)} if network.definition else {}
    return own | _files("model.net", network.net, besides=network.definition)


def _teacher(teacher: Network | None) -> dict[str, str]:
    if teacher is None:
        return {}
    key, weights = "schedule.distill.teacher", teacher.weights
    found = {} if _content(weights) == str(weights) else {f"{key}.weights": _content(weights)}
    return found | _files(f"{key}.net", teacher.net)


def _files(key: str, net: Spec, besides: str | None = None) -> dict[str, str]:
    """Returns the hash of each existing file that an argument of a network names (`backbone`), by the argument's key."""
    named = {name: value for name, value in net.items() if isinstance(value, str) and value != besides}
    return {f"{key}.{name}": _content(value) for name, value in named.items() if _at_hand(value)}


def _at_hand(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text too long for a name
        return False


def _content(source: str | Path | None) -> str:
    """Returns a file's hash, or the name itself where there is no such file (a torchvision name, a URL with its own hash)."""
    path = Path(str(source))
    if (name := zoo.name_of(source)) is not None:
        return zoo.content(str(source)) if name in zoo.names() else str(source)
    try:
        if path.is_dir():
            path = path / "checkpoints" / "last.ckpt"
        return sha256(path) if source is not None and path.is_file() else str(source)
    except OSError:  # a name too long for a file, or an unreadable file: opening it later raises the error
        return str(source)
