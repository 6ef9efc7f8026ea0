"""What one choice chose for another (`quant=lsq` chooses `schedule=qat`), and the names that a file leaves to its own name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)
_NAMED = ("model", "dataset", "quant", "schedule")  # whose `name` tables show


def named(cfg: DictConfig, choices: Mapping[str, str | None]) -> DictConfig:
    """Returns the configuration in which each model, data set, recipe and schedule without a `name` has that of its file."""
    for key, choice in choices.items():
        group, _, package = key.partition("@")
        node = None if group not in _NAMED or choice is None else _node(cfg, package or group)
        if isinstance(node, DictConfig) and "name" not in node:
            with open_dict(node):
                node.name = PurePosixPath(choice).name
    return cfg


def _node(cfg: DictConfig, path: str) -> DictConfig | None:
    node = cfg
    for part in path.split("."):
        node = node.get(part) if isinstance(node, DictConfig) else None
    return node


def tell(hydra: HydraConf) -> None:
    """Logs in one line what choices chose for others; a line that this process has logged, of another point of a sweep, is not repeated."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    found = chosen_by(hydra.runtime.choices, hydra.overrides.task, folders)
    if found:
        _once(", ".join(f"{what} (chosen by {by})" for what, by in found.items()))


@cache
def _once(line: str) -> None:
    log.info("%s", line)


def chosen_by(choices: Mapping[str, str | None], typed: Sequence[str], folders: Sequence[Path]) -> dict[str, str]:
    """Returns which choices were made by the file of another choice: `{"schedule=qat": "quant=lsq"}`.

    Args:
        choices: Of every group, as Hydra composed them.
        typed: The overrides of the command line; what they choose was chosen by nobody else.
        folders: With configuration files.
    """
    parsed = OverridesParser.create().parse_overrides(list(typed))
    own = {f"{o.key_or_group}@{o.package}" if o.package else o.key_or_group for o in parsed}
    found: dict[str, str] = {}
    groups = sorted(choices, key=lambda group: group != "experiment")  # what it chooses beats what its choices choose
    for group in (group for group in groups if not group.startswith("hydra") and choices[group]):
        for other, choice in _overrides(folders, group.partition("@")[0], str(choices[group])):
            if other not in own and other != group and choices.get(other) == choice:
                found.setdefault(f"{other}={choice}", f"{group}={choices[group]}")
    return found


def _overrides(folders: Sequence[Path], group: str, choice: str) -> Iterator[tuple[str, str]]:
    """Yields what a file and those it is made of choose for other groups."""
    file = next((path for folder in folders if (path := folder / group / f"{choice}.yaml").is_file()), None)
    if file is None:  # a pair of widths
        return
    content = yaml.safe_load(file.read_text())
    for entry in content.get("defaults") or [] if isinstance(content, dict) else []:
        if isinstance(entry, str) and entry != "_self_":
            path = entry.partition("@")[0]
            above, _, name = path.lstrip("/").partition("/") if path.startswith("/") else (group, "", path)
            yield from _overrides(folders, above, name)
        elif isinstance(entry, dict):
            for key, value in entry.items():
                if key.startswith("override "):
                    other, _, package = key.removeprefix("override ").lstrip("/").partition("@")
                    package = package.removeprefix("_global_").strip(".")
                    yield f"{other}@{package}" if package not in ("", other) else other, value
