"""The choices of each group of `conf/`: as names to check against, and as text for people."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import OmegaConf

from qexp.command.folders import CONF, config_folders
from qexp.command.widths import SPELLED, pair

LINE = 118


def offered(folders: Sequence[Path], group: str) -> list[str]:
    """Returns the choices in the files of a group; those in its folders by their path, `placed/resnet20/pact`.

    Files that begin with `_` are parts of others and are not choices.
    """
    found = set()
    for folder in folders:
        for file in (folder / group).rglob("*.yaml"):
            path = file.relative_to(folder / group).with_suffix("")
            if not any(part.startswith("_") for part in path.parts):
                found.add(path.as_posix())
    return sorted(found)


def is_offered(name: str, folders: Sequence[Path], group: str) -> bool:
    """Returns whether a group has a choice; any pair of widths is one of `bits`."""
    return name in offered(folders, group) or (group == "bits" and pair(name) is not None)


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns `" (did you mean 'a', 'b'?)"`; a choice in a folder is also found without the folder's name.

    >>> nearest("toynet_pakt", ["pact", "placed/toynet/pact"])
    " (did you mean 'placed/toynet/pact', 'pact'?)"
    """
    spelled = {"_".join(full.split("/")[1:]) or full: full for full in names if "/" in full} | {n: n for n in names}
    close = [spelled[match] for match in get_close_matches(name.strip("*"), list(spelled), n=3, cutoff=0.4)]
    return f" (did you mean {', '.join(map(repr, dict.fromkeys(close)))}?)" if close else ""


def grouped(group: str, names: Sequence[str]) -> str:
    """Returns choices as lines: those at the top of the group first, then one line per folder.

    >>> print(grouped("quant", ["lsq", "placed/toynet/dorefa", "placed/toynet/pact"]))
      lsq
      placed/toynet/{dorefa, pact}
    """
    within: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        within.setdefault(folder, []).append(last)
    top = [*within.pop("", []), *([SPELLED] if group == "bits" else [])]
    lines = [", ".join(top)] if top else []
    lines += [f"{folder}/{{{', '.join(last)}}}" for folder, last in sorted(within.items())]
    return "\n".join(
        textwrap.fill(line, LINE, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    )


def all_groups(conf: Path = CONF) -> str:
    """Returns every group with its choices, in the form of `--help`."""
    folders = config_folders(sys.argv, conf)
    groups = sorted({g.name for folder in folders for g in folder.iterdir() if g.is_dir()} - {"hydra"})
    return "\n".join(f"{group}\n{grouped(group, offered(folders, group))}" for group in groups)


def explained(conf: Path = CONF) -> str:
    """Returns the keys at the root with the comments that stand beside them in `config.yaml`, and where the other keys are explained."""
    found = [re.match(r"(\w+):(.*?)\s+# (.*)", line) for line in (conf / "config.yaml").read_text().splitlines()]
    rows = [(match[1], match[3]) for match in found if match]
    width = max(len(name) for name, _ in rows)
    lines = [
        textwrap.fill(f"{name:{width}}  {text}", LINE, initial_indent="  ", subsequent_indent=" " * (width + 4))
        for name, text in rows
    ]
    return "\n".join([*lines, f"  The keys of a choice are explained in its file, {conf}/GROUP/CHOICE.yaml"])


def register() -> None:
    """Registers the lists as `${choices:}` and `${explained:}`, for the text of `--help` in `conf/config.yaml`."""
    OmegaConf.register_new_resolver("choices", all_groups, replace=True)
    OmegaConf.register_new_resolver("explained", explained, replace=True)
