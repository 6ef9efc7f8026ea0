"""Which keys the configuration files hold: one that none of them has is answered with the nearest before Hydra composes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qexp.errors import RENAMED, QexpError, near

ELSEWHERE = {  # of Lightning's Trainer: the length of a training is the schedule's
    "trainer.max_epochs": "schedule.epochs",
    "trainer.min_epochs": "schedule.epochs",
    "trainer.max_steps": "schedule.max_steps",
    "trainer.min_steps": "schedule.max_steps",
}
NAMES = ("quant.rules", "model.key_map")  # mappings whose keys are names that anybody gives


def check_key(key: str, folders: Sequence[Path]) -> None:
    """Checks a key with a dot against the files of all choices, whichever are chosen: it must stand in one of them.

    Not judged is what lies below a key that is no mapping in any file, or below one that takes another's place (an interpolation, a
    group put there by `@`).

    Args:
        key: `schedule.optimizer.lr`.
        folders: With configuration files; a folder in them is a group.

    Raises:
        QexpError: No file has it.
    """
    *above, _ = path = key.split(".")
    if any(key.startswith(f"{open_one}.") for open_one in NAMES):
        return
    children: list[set[str]] = [set() for _ in path]  # of the root, of the first part, ...
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
                raise QexpError(f"there is no key {key!r}; how long a training is, {ELSEWHERE[key]} says")
            if above[0] == "quant" and part in RENAMED:
                raise QexpError(f"there is no key {key!r}; {part} is called {RENAMED[part]} now")
            raise QexpError(
                f"there is no key {prefix + part!r}{near(part, sorted(children[depth]), prefix=prefix)}; see run.py --cfg job; "
                f"an option that no file names is added with a plus, +{key}=..."
            )


@cache
def _files(folders: tuple[Path, ...], group: str) -> list[tuple[Path, Path]]:
    """Returns all configuration files, each after its folder; those of a group first, where its keys are found soonest."""
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    parts = [file.relative_to(folder).parts for folder, file in files]
    own = [found for found, names in zip(files, parts) if names[0] == group]
    return own + [found for found, names in zip(files, parts) if names[0] not in (group, "hydra")]


@cache
def _tree(folder: Path, file: Path) -> dict[str, Any]:
    """Returns the keys that a file brings, from the root of the configuration; where it puts a group by `@`, that sign."""
    text = file.read_text()
    header = re.match(r"\s*#\s*@package\s+(\S+)", text)
    # a file in a folder of a group is a choice of that group: quant=placed/resnet20/pact
    package = (
        header[1].removeprefix("_global_").strip(".") if header else ".".join(file.relative_to(folder).parts[:-1][:1])
    )
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # Hydra says what is wrong with it
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
