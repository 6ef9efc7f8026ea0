"""The commands of the program besides a run: `qexp report STUDY`, `qexp prepare ...`, `qexp new ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf


class Command(NamedTuple):
    """A command: the module whose `main(words)` returns the exit status, and what `--help` says of it."""

    module: str
    usage: str
    does: str


COMMANDS = {
    "report": Command("qexp.report.__main__", "STUDY ...", "writes the table and the page of a study anew, or serves the page"),
    "prepare": Command("qexp.command.prepare", "KEY=VALUE ...", "decodes and packs a data set's images before anything runs on them"),
    "new": Command("qexp.command.new", "KIND NAME", "writes a quantizer, model, dataset or range that runs, to edit"),
    "check": Command("qexp.command.check", "zoo:NAME ...", "repeats what entries of the zoo claim: files, integers, score"),
    "check-plugin": Command("qexp.command.check_plugin", "FOLDER|NAME", "tries everything in a folder of YAML, or in an installed plugin"),
}  # fmt: skip


def called() -> str:
    """Returns the way in which this program was started, for sentences that tell the user what to type."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        return "python -m qexp"
    return "python run.py" if name == "run.py" else "qexp"


def listed() -> str:
    """Returns the commands as lines, in the form of `--help`."""
    lines = [(f"{called()} {name} {command.usage}", command.does) for name, command in COMMANDS.items()]
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"  {left:{width}}   {right}" for left, right in lines)


def register() -> None:
    """Registers the lines as `${commands:}`, and the program's name as `${called:}`, for the text of `--help`."""
    OmegaConf.register_new_resolver("commands", listed, replace=True)
    OmegaConf.register_new_resolver("called", called, replace=True)
