"""Adds finished runs to the zoo, and writes published rows beside them.

python -m experiments.zoo add RUN_FOLDER NAME [--published 90.2 --source "Esser et al. 2019"]
python -m experiments.zoo publish NAME --published 90.2 --source "Esser et al. 2019"
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.errors import QexpError
from qexp.results import zoo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m experiments.zoo", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="what", required=True)
    add = commands.add_parser("add", help="make a run an entry, whole or not at all")
    add.add_argument("run", type=Path, help="folder of the finished run")
    add.add_argument("name", help="name of the entry, such as resnet20_w4a4_lsq")
    add.add_argument("--sample", type=int, default=500, help="test samples of the default check (500)")
    add.add_argument("--command", help="the command that made the run, where its record has none")
    publish = commands.add_parser(
        "publish", help="write the published row beside an entry; without options, take it away"
    )
    publish.add_argument("name", help="name of the entry")
    for command in (add, publish):
        command.add_argument("--published", type=float, help="the published figure, in the unit of the score")
        command.add_argument("--source", help="where it is published")
        command.add_argument("--zoo", type=Path, default=None, help="folder of the zoo")
    asked = parser.parse_args(argv)
    if (asked.published is None) != (asked.source is None):
        parser.error("--published and --source belong together")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qexp.run.zoo_pack").setLevel(logging.INFO)
    from qexp.run import zoo_pack  # seconds to import

    published = {"value": asked.published, "source": asked.source} if asked.source else None
    try:
        folder = asked.zoo or zoo.root()
        if asked.what == "publish":
            entry = zoo_pack.publish(asked.name, folder, published)
        else:
            entry = zoo_pack.add(asked.run, asked.name, folder, published, asked.sample, asked.command)
    except QexpError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{entry.name}: {entry.card['bytes']:,} bytes in {entry.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
