"""Checks keys against the configuration files before Hydra composes; an error names the nearest existing key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qexp.command.commands import called
from qexp.errors import RENAMED, QexpError, near

ELSEWHERE = {  # options of Lightning's Trainer whose place is in the schedule
    "trainer.max_epochs": "schedule.epochs",
    "trainer.min_epochs": "schedule.epochs",
    "trainer.max_steps": "schedule.max_steps",
    "trainer.min_steps": "schedule.max_steps",
}
NAMES = ("quant.rules", "model.key_map")  # mappings whose keys are free names


def check_key(key: str, folders: Sequence[Path]) -> None:
    """Raises if no configuration file holds a dotted key, whichever files are chosen.

    Keys below an interpolation, below a group placed with `@`, or below a value that is not a mapping in any file are not checked.

    Args:
        key: `schedule.optimizer.lr`.
        folders: Folders with configuration files; a folder in them is a group.

    Raises:
        QexpError: No file has the key.
    """
    *above, _ = path = key.split(".")
    if any(key.startswith(f"{open_one}.") for open_one in NAMES):
        return
    children: list[set[str]] = [set() for _ in path]  # keys of the root, of the first part, ...
    for folder, file in _files(tuple(folders), path[0]):
        node: Any = _tree(folder, file)
        for depth, part in enumerate(path):
            if isinstance(node, str):
                return
            if not isinstance(node, dict):
                break
            children[depth] |= node.keys()
            if part not in node:
                break
            node = node[part]
        else:
            return
    for depth, part in enumerate(path):
        if children[depth] and part not in children[depth]:
            prefix = "".join(f"{name}." for name in above[:depth])
            if key in ELSEWHERE:
                raise QexpError(f"there is no key {key!r}; set the length of training with {ELSEWHERE[key]}")
            if above[0] == "quant" and part in RENAMED:
                raise QexpError(f"there is no key {key!r}; {part} is now called {RENAMED[part]}")
            raise QexpError(
                f"there is no key {prefix + part!r}{near(part, sorted(children[depth]), prefix=prefix)}; see {called()} --cfg job; "
                f"add an option that no file names with a plus, +{key}=..."
            )


@cache
def _files(folders: tuple[Path, ...], group: str) -> list[tuple[Path, Path]]:
    """Returns all configuration files, each with its folder; those of the key's group come first, to find it quickly."""
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    parts = [file.relative_to(folder).parts for folder, file in files]
    own = [found for found, names in zip(files, parts) if names[0] == group]
    return own + [found for found, names in zip(files, parts) if names[0] not in (group, "hydra")]


@cache
def _tree(folder: Path, file: Path) -> dict[str, Any]:
    """Returns the keys that a file adds, from the root of the configuration; `@` marks a place where it puts a group."""
    text = file.read_text()
    header = re.match(r"\s*#\s*@package\s+(\S+)", text)
    # a file in a folder of a group is a choice of that group: quant=placed/resnet20/pact
    package = (
        header[1].removeprefix("_global_").strip(".") if header else ".".join(file.relative_to(folder).parts[:-1][:1])
    )
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # Hydra raises the error
        return {}
    tree = content if isinstance(content, dict) else {}
    defaults = tree.pop("defaults", None) or []
    for name in reversed(package.split(".") if package else []):
        tree = {name: tree}
    for key in (key for entry in defaults if isinstance(entry, dict) for key in entry):
        group, _, place = str(key).partition("@")
        absolute = place.startswith("_global_")
        place = place.removeprefix("_global_").strip(".")
        if place and not (absolute and place == group.split("/")[-1]):
            _put(tree, place if absolute or not package else f"{package}.{place}")
    return tree


def _put(tree: dict[str, Any], place: str) -> None:
    *above, last = place.split(".")
    for name in above:
        below = tree.get(name)
        tree[name] = below if isinstance(below, dict) else {}
        tree = tree[name]
    tree[last] = "@"
