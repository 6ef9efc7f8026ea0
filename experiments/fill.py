"""Fills the tables of a page: `python -m experiments.fill experiments/STUDY/README.md [...]`.

A table stands between `<!-- python -m experiments.MODULE ARGUMENTS -->` and `<!-- end -->`: the command is run, and what it prints is
put there. So each page shows where its figures come from, and none is typed by hand.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- python -m (experiments\.[\w.]+)([^\n]*?) -->\n.*?<!-- end -->", re.S)


def filled(text: str) -> str:
    """Returns a page with what its commands print now.

    Raises:
        RuntimeError: A command failed, for one because the run folders are not there.
    """

    def printed(block: re.Match[str]) -> str:
        module, arguments = block[1], block[2]
        command = [sys.executable, "-m", module, *shlex.split(arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"python -m {module}{arguments}: {done.stderr.strip().splitlines()[-1]}")
        return f"<!-- python -m {module}{arguments} -->\n{done.stdout.strip()}\n<!-- end -->"

    return BLOCK.sub(printed, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", metavar="PAGE")
    for page in parser.parse_args().pages:
        before = page.read_text()
        if not BLOCK.search(before):
            raise SystemExit(
                f"{page}: no table to fill; mark one with <!-- python -m experiments.MODULE ... --> and <!-- end -->"
            )
        after = filled(before)
        page.write_text(after)
        print(f"{page}: {'filled anew' if after != before else 'up to date'}")


if __name__ == "__main__":
    main()
