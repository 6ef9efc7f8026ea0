"""The program `qexp`, which `python run.py` in a clone and `python -m qexp` start too."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from qexp.command.commands import COMMANDS, called


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, or else a run or a sweep; returns the exit status.

    Args:
        argv: The words after the program's name; None takes them from the command line.
    """
    wait_briefly()
    words = list(sys.argv[1:] if argv is None else argv)
    first = words[0] if words else ""
    if first in COMMANDS:
        return importlib.import_module(COMMANDS[first].module).main(words[1:]) or 0
    if first and "=" not in first and not first.startswith(("-", "~")):
        close = get_close_matches(first, COMMANDS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        print(
            f"{called()} {first}: there is no such command{hint}; use {', '.join(COMMANDS)}, or KEY=VALUE for a run; "
            f"see {called()} --help",
            file=sys.stderr,
        )
        return 2
    from qexp.command.run import main as run  # a second to import, which the commands above do not need

    return run(words)


def wait_briefly() -> None:
    """Lets PyTorch's threads sleep after microseconds of waiting for each other, unless the environment says how they wait.

    By default they wait at full speed for some milliseconds. Beside other work one thread often has no core, and the other wastes its
    own: a training of small layers on two threads took 14 times as long as on one.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"  # read when torch is imported
