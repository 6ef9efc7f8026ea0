"""`python -m qexp.command.check zoo:NAME`: repeats what entries of the zoo claim; `zoo:all` takes every entry."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qexp.errors import QexpError
from qexp.results import zoo

EVERY = "all"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each entry; returns 0 where nothing differs from its card, else 1."""
    parser = argparse.ArgumentParser(
        prog="qexp check",
        description="Compares an entry's files with their hashes, then repeats its golden vectors, its integer program and its score.",
    )
    parser.add_argument("entries", nargs="+", metavar="zoo:NAME", help="entries of the zoo; zoo:all takes every one")
    parser.add_argument("--images", default=None, metavar="N", help="test samples to score; all: every one")
    asked = parser.parse_args(argv)
    if asked.images not in (None, EVERY) and not (asked.images.isdigit() and int(asked.images)):
        parser.error(f"--images {asked.images} is not allowed; use a whole number of at least 1, or all")
    try:
        names = chosen(asked.entries)
    except QexpError as error:
        print(error, file=sys.stderr)
        return 1
    samples = None if asked.images in (None, EVERY) else int(asked.images)
    found = [_holds(name, samples, asked.images == EVERY) for name in names]  # all of them, also after one that fails
    return int(not all(found))


def chosen(entries: Sequence[str]) -> list[str]:
    """Returns the names of the entries that are typed.

    Raises:
        QexpError: One does not begin with `zoo:`, or is not in the zoo.
    """
    found: dict[str, None] = {}
    for entry in entries:
        name = zoo.name_of(entry)
        if name is None:
            raise QexpError(f"{entry} is not allowed; name an entry of the zoo: zoo:NAME, or zoo:all")
        every = zoo.names() if name == EVERY else [zoo.find(name).name]
        if not every:
            zoo.find(name)
        found |= dict.fromkeys(every)
    return list(found)


def _holds(name: str, samples: int | None, whole: bool) -> bool:
    """Checks one entry and prints the result; a changed file is one line."""
    from qexp.run.zoo_check import check  # seconds to import

    try:
        report = check(f"{zoo.PREFIX}{name}", samples, whole)
    except QexpError as error:
        print(f"{zoo.PREFIX}{name}\n  {error}", flush=True)
        return False
    print(report.text(), flush=True)
    return report.holds


if __name__ == "__main__":
    sys.exit(main())
