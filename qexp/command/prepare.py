"""`qexp prepare dataset=imagenet model=resnet50`: decodes and packs a data set's images before anything runs on them.

A run does the same when it first uses the images; this command also checks every image of the pack and prints the gain.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import DictConfig

from qexp.command.choices import check_choices, key_maps_quoted, rules_added
from qexp.command.commands import called
from qexp.command.folders import CONF
from qexp.command.root import register


def prepare(cfg: DictConfig) -> list[str]:
    """Packs the splits that are not packed yet, reads every pack back and returns one line per pack."""
    from qexp.data.pack import Pack
    from qexp.errors import QexpError
    from qexp.run.datasets import load_data
    from qexp.run.settings import read

    data = load_data(read(cfg).data.module)
    packs = {p.path: p for p in (data.arrays.train_images, data.arrays.test_images) if isinstance(p, Pack)}
    if not packs:
        raise QexpError(f"dataset={cfg.dataset.name} is held in memory: there is nothing to pack")
    return [line(pack, 256) for pack in packs.values()]


def line(pack, batch: int) -> str:
    """Returns a pack's content and its speed of reading and of decoding in one line, and compares every checksum."""
    start = time.perf_counter()
    for first in range(0, len(pack), batch):
        pack[first : first + batch]
    rate = len(pack) / (time.perf_counter() - start)
    decoded = pack.about.get("images_per_second")
    others = [f"{n} {mode} converted" for mode, n in pack.converted.items()]
    others += [f"{len(pack.skipped)} skipped"] if pack.skipped else []
    gain = f", decoded at {decoded:.0f}/s: {rate / decoded:.0f} times faster" if decoded else ""
    what = f"{len(pack)} images {list(pack.shape[1:])}, {pack.path.stat().st_size / 1e6:.0f} MB"
    return f"{pack.path}: {', '.join([what, *others])}; checked and read at {rate:.0f}/s{gain}"


def main(argv: Sequence[str] | None = None) -> int:
    """Packs what the words name and prints a line per pack; returns 0, or 2 with one line on stderr for a mistake."""
    from hydra import compose, initialize_config_dir

    from qexp.errors import QexpError

    parser = argparse.ArgumentParser(prog=f"{called()} prepare", description="Pack a data set's images once.")
    parser.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="as for a run: dataset=imagenet model=resnet50"
    )
    words = parser.parse_args(argv).overrides
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    register()
    try:
        words = key_maps_quoted(rules_added(words))
        check_choices(words, CONF)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=words)
        print("\n".join(prepare(cfg)))
    except (QexpError, HydraException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
