"""Choices made by other choices (`quant=lsq` chooses `schedule=qat`), and names taken from file names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict, read_write

log = logging.getLogger(__name__)
_NAMED = ("model", "dataset", "quant", "schedule")  # groups whose `name` the tables show


def named(cfg: DictConfig, choices: Mapping[str, str | None]) -> DictConfig:
    """Returns the configuration in which each model, data set, recipe and schedule without a `name` gets the name of its file."""
    for node, name in _unnamed(cfg, choices):
        with read_write(node), open_dict(node):
            node.name = name
    return cfg


def study_of(cfg: DictConfig, choices: Mapping[str, str | None]) -> str:
    """Returns the name of a point's study, which may be named after models without a name too."""
    if any(True for _ in _unnamed(cfg, choices)):
        cfg = named(cfg.copy(), choices)  # not the job's own; a copy takes longer than all else here
    return str(cfg.study)


def _unnamed(cfg: DictConfig, choices: Mapping[str, str | None]) -> Iterator[tuple[DictConfig, str]]:
    """Yields each model, data set, recipe and schedule without a `name`, and the name of its file."""
    for key, choice in choices.items():
        group, _, package = key.partition("@")
        node = None if group not in _NAMED or choice is None else _node(cfg, package or group)
        if isinstance(node, DictConfig) and "name" not in node:
            yield node, PurePosixPath(choice).name


def _node(cfg: DictConfig, path: str) -> DictConfig | None:
    node = cfg
    for part in path.split("."):
        node = node.get(part) if isinstance(node, DictConfig) else None
    return node


def tell(hydra: HydraConf) -> None:
    """Logs in one line the choices made by other choices; a line already logged by this process is not repeated."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    found = chosen_by(hydra.runtime.choices, hydra.overrides.task, folders)
    if found:
        _once(", ".join(f"{what} (chosen by {by})" for what, by in found.items()))


@cache
def _once(line: str) -> None:
    log.info("%s", line)


def chosen_by(choices: Mapping[str, str | None], typed: Sequence[str], folders: Sequence[Path]) -> dict[str, str]:
    """Returns the choices that the file of another choice made: `{"schedule=qat": "quant=lsq"}`.

    Args:
        choices: The choice of every group, from Hydra.
        typed: The overrides of the command line; the choices in them are the user's own.
        folders: Folders with configuration files.
    """
    parsed = OverridesParser.create().parse_overrides(list(typed))
    own = {f"{o.key_or_group}@{o.package}" if o.package else o.key_or_group for o in parsed}
    found: dict[str, str] = {}
    # the choices of an experiment take precedence over those of the files it chooses
    groups = sorted(choices, key=lambda group: group != "experiment")
    for group in (group for group in groups if not group.startswith("hydra") and choices[group]):
        for other, choice in _overrides(folders, group.partition("@")[0], str(choices[group])):
            if other not in own and other != group and choices.get(other) == choice:
                found.setdefault(f"{other}={choice}", f"{group}={choices[group]}")
    return found


@cache  # as Hydra's choices of this process, which each point of a sweep asks for
def _defaults(file: Path) -> list[Any]:
    """Returns the defaults list of a configuration file."""
    content = yaml.safe_load(file.read_text())
    return (content.get("defaults") or []) if isinstance(content, dict) else []


def _overrides(folders: Sequence[Path], group: str, choice: str) -> Iterator[tuple[str, str]]:
    """Yields the choices that a file and its defaults make for other groups."""
    file = next((path for folder in folders if (path := folder / group / f"{choice}.yaml").is_file()), None)
    if file is None:  # a pair of widths
        return
    for entry in _defaults(file):
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
