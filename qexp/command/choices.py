"""Checks choices and keys of the command line before Hydra composes; an error names the nearest existing ones."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from qexp.command.commands import called
from qexp.command.folders import config_folders
from qexp.command.keys import check_key
from qexp.command.listing import grouped, is_offered, nearest, offered
from qexp.command.renamed import answer
from qexp.command.root import Root
from qexp.errors import QexpError, near
from qexp.models.key_maps import parsed

OPTIONAL = ("deploy", "search", "experiment", "debug", "logger")  # groups that need no choice
BY_NAME = ("timm", "torchvision", "import")  # models that are named on the command line
# options that only show the configuration: nothing runs
_LOOKS = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info")


def check_choices(arguments: Sequence[str], conf: Path) -> None:
    """Checks each `GROUP=CHOICE` and each root key, also those of a sweep; overrides it cannot parse are left to Hydra.

    Args:
        arguments: The command line after the program's name. `--config-dir` in it names another folder with choices.
        conf: The folder of configuration files; a folder in it is a group.

    Raises:
        QexpError: A choice has no file, a key does not exist, or a mapping of widths has quoted patterns.
    """
    folders = config_folders(arguments, conf)
    own_root = any(word.startswith(("--config-name", "-cn")) for word in arguments)
    for word in arguments:
        if re.match(r"\+*layer_[wa]bit=\{\s*[\"']", word):
            raise QexpError(
                f"{word}: write the patterns of a mapping without quotes: 'layer_wbit={{layer1.*: 4, linear: 8}}'"
            )
        _check_letters(word)
    _check_replaced(arguments)
    own_keys = own_root or any(word.lstrip("+").startswith("hydra.searchpath=") for word in arguments)
    given = [o for o in _overrides(arguments) if _adds(o) or o.package or isinstance(o.value(), dict)]
    brought = [o.package or o.key_or_group for o in given]  # keys there, or below, need no file
    for override in _overrides(arguments):
        group = override.key_or_group
        if re.split("[/.]", group)[0] == "hydra" or override.is_delete():
            continue
        if offered(folders, group):
            _check_choice(override, folders)
        elif not {".", "/"} & set(group) and not _adds(override) and not own_root:
            known = sorted(
                {f.name for f in fields(Root)} | {g.name for f in folders for g in f.iterdir() if g.is_dir()}
            )
            if group not in known:
                raise QexpError(
                    f"{override.input_line}: there is no key {group!r}{near(group, known)}; see {called()} --cfg job"
                )
        elif "." in group and not own_keys and not any(f"{group}.".startswith(f"{place}.") for place in brought):
            try:
                check_key(group, folders)
            except QexpError as error:
                raise QexpError(f"{override.input_line}: {error}") from None


def _check_choice(override: Override, folders: Sequence[Path]) -> None:
    """Raises for a choice without a file in its group; the error lists the choices, or the new name of a former choice."""
    group, line = override.key_or_group, override.input_line
    if override.value() is None and group not in OPTIONAL and not _adds(override):
        raise QexpError(f"{line} is not allowed; choose a file:\n{grouped(group, offered(folders, group))}")
    chosen = list(_chosen(override.value()))
    wrong = next((name for name in chosen if not is_offered(name, folders, group)), None)
    if wrong is not None:
        if instead := answer(group, chosen):
            raise QexpError(f"{line}: {group} has no choice {wrong!r} any more; {instead}")
        names = offered(folders, group)
        raise QexpError(
            f"{line}: {group} has no choice {wrong!r}{nearest(wrong, names)}; allowed are\n{grouped(group, names)}"
        )
    for name in chosen:
        if len(homes := [f for f in folders if (f / group / f"{name}.yaml").is_file()]) > 1:
            raise QexpError(
                f"{line}: {name} lies in {' and in '.join(str(f / group) for f in homes)}, and only the first would count; rename yours"
            )
    top, _, folder = group.partition("/")
    if folder and chosen and not _adds(override) and not override.package:
        raise QexpError(
            f"{line}: {group} is a folder of {top}; write {top}={','.join(f'{folder}/{c}' for c in chosen)}"
        )


def _check_letters(word: str) -> None:
    """Raises for letters that are not allowed, or that Hydra reads only in quotes; the error gives the right spelling."""
    key, is_override, value = word.partition("=")
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in word):
        raise QexpError(f"{word!r} is not allowed; leave out control characters and line ends")
    if not is_override or word.isascii() or word.startswith("-"):
        return
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        strange = next((letter for letter in value if not letter.isascii()), None)
        if strange is not None and not {"'", '"'} & set(value):
            raise QexpError(
                f"{word}: Hydra reads letters such as {strange!r} only in quotes of its own; write '{key}=\"{value}\"'"
            ) from None


def _check_replaced(arguments: Sequence[str]) -> None:
    """Raises for an option of an optimizer or scheduler that the run does not have: it would have no effect.

    Either another one replaces the schedule's, or none is chosen beside the schedule's (an experiment may choose one).
    """
    chosen = {o.key_or_group: o.value() for o in _overrides(arguments)}
    for group in ("optimizer", "scheduler"):
        none = group not in chosen and "experiment" not in chosen and "+experiment" not in chosen
        alone = next((key for key in chosen if key.startswith(f"{group}.")), None)
        if none and alone is not None:
            raise QexpError(
                f"{alone}: no {group} is chosen beside the schedule's own; set schedule.{alone}, or choose {group}= as well"
            )
        idle = next((key for key in chosen if key.startswith(f"schedule.{group}.")), None)
        if chosen.get(group) is not None and idle is not None:
            raise QexpError(
                f"{idle}: {group}={chosen[group]} replaces the whole schedule.{group}; set {idle.removeprefix('schedule.')}"
            )


def rules_added(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with `++` before each `quant.rules.NAME=...`, which Hydra needs if a recipe lacks the rule.

    Likewise before each `model.net.ARGUMENT=...` of a network that is named on the command line: its constructor knows its arguments.
    And before `model.net.start=...`, which every network of torchvision and timm takes and no file names.

    >>> rules_added(["quant=mse", "quant.rules.wide={layers: conv1, weight: {bits: 8}}", "+quant.rules.x=null"])
    ['quant=mse', '++quant.rules.wide={layers: conv1, weight: {bits: 8}}', '+quant.rules.x=null']
    >>> rules_added(["model=resnet18", "model.net.start=DEFAULT"])
    ['model=resnet18', '++model.net.start=DEFAULT']
    """
    free = ["quant.rules.", "model.net.start="]
    if {f"model={name}" for name in BY_NAME} & set(arguments):
        free.append("model.net.")
    return [f"++{word}" if word.startswith(tuple(free)) and "=" in word else word for word in arguments]


def key_maps_quoted(arguments: Sequence[str]) -> list[str]:
    r"""Returns the command line with each key map as one text, since patterns are not keys in Hydra's grammar.

    >>> key_maps_quoted(["model=resnet20", r'model.key_map={"^net\.": "", "ops$": null}'])
    ['model=resnet20', 'model.key_map=\'{"^net\\\\.": "", "ops$": null}\'']

    Raises:
        QexpError: A key map is not a mapping.
    """
    return [_quoted(word) if re.match(r"\+*[\w.@]+\.key_map=\s*\{", word) else word for word in arguments]


def _quoted(word: str) -> str:
    key, _, text = word.partition("=")
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        said = json.dumps(parsed(text), ensure_ascii=False).replace("'", "\\'")
        return f"{key}='{said}'"
    return word


def check_runs_dir(arguments: Sequence[str]) -> None:
    """Makes the folder that `runs_dir` names, before Hydra does; not if the command only shows the configuration.

    Raises:
        QexpError: The folder cannot be made, or written to.
    """
    if any(word.partition("=")[0] in _LOOKS for word in arguments):
        return
    for override in _overrides(arguments):
        value = override.value()
        if override.key_or_group != "runs_dir" or not isinstance(value, str) or "${" in value:
            continue
        if any(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") for letter in value):
            raise QexpError(f"{override.input_line!r} is not allowed; leave out control characters and line ends")
        try:
            Path(value).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QexpError(f"{override.input_line}: the folder cannot be made ({error.strerror})") from error
        if not os.access(value, os.W_OK):
            raise QexpError(f"{override.input_line}: the folder cannot be written to")


def _overrides(arguments: Sequence[str]) -> Iterator[Override]:
    parser = OverridesParser.create()
    for word in arguments:
        if "=" in word and not word.startswith("-"):
            try:
                yield parser.parse_override(word)
            except HydraException:  # Hydra raises the error
                continue


def _adds(override: Override) -> bool:
    """Whether the override is `+KEY=` or `++KEY=`, whose key may be new."""
    return override.is_add() or override.is_force_add()


def _chosen(value: Any) -> Iterator[str]:
    """Yields the names in a choice, a list of choices or a sweep over either."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, list):
        for one in value:
            yield from _chosen(one)
    elif isinstance(value, str | int | float) and not str(value).startswith("${"):
        yield str(value).removesuffix(".yaml")
