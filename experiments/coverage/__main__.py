"""Which networks quantize, fold, lower, prove equal and export: `python -m experiments.coverage [PATTERN ...]`.

Writes `coverage.json` beside this file after each network, in a process of its own with limits on time and memory, and the table into
`README.md`. A network that is in the file is not run again, unless `--again` is given; several programs at once share the
rows. Columns:

* quantize: percentage of products that stay in float at 8 bits, with `deploy=integer`;
* fold: batch norms that are left; the float result moved by less than 1e-4, or than four times what float32 moves it against float64 (a
  network of 100 random layers spreads each rounding);
* lower: operations of the integer program;
* equal: codes that differ between the program and the network with the program's rounding, on two images, the first of which goes
  through the NumPy definition too;
* onnx: codes and scores that differ between onnxruntime and the program, with `deploy=int8`, on two images;
* c99: scores that differ between the compiled package and the program, on one image.

The last two are not tried for networks of more than 6 million weights (`--large` gives another number): a compiler reads about a
million in a second. Detectors have no single tensor of scores, so that they end at quantize; segmentation networks are lowered to
their scores. A network may take 14 GiB of memory; vit_l_16 and vit_l_32 were run with `--memory 19`, regnet_y_128gf with 18 and
vit_h_14 with 20. A cell without a number holds the reason. Row `darknet` of `conf` is the network of `darknet.cfg`, with one
section of every kind that is read. Weights and images are random; images have 64 pixels where the network allows it.

Cells that are older than the last changes to what they measure. Column `onnx`: sums that several grids read, and codes between
two grids, changed after all numbers but those of yolov8 of `conf`, mixnet_s, ghostnet_100 and regnety_002 of `timm`, and
`torchvision`; sums behind a split or a concatenation after all but those of mixnet_s, regnety_002, mnasnet0_5, mnasnet0_75 and
shufflenet_v2_x1_5. The differing codes of hrnet_w18_small are such a cell. Column `equal`: batch norms whose summand lies half-
way between two steps changed after the rows of `timm` with batch norms left in `fold`, but for resnetv2_50.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from experiments.coverage.networks import networks
from experiments.coverage.one import COLUMNS, LARGE, MEMORY, cells_of
from qexp.system.locks import locked
from qexp.system.whole_files import whole, write_text

HERE = Path(__file__).parent
FILE = HERE / "coverage.json"
CLAIMS = Path(tempfile.gettempdir()) / "qexp-coverage"  # a lock per row that runs
QUESTION = "Which networks quantize, fold, lower to integers that are proven equal, and export, as they are?"
SECONDS = 240  # of processor time
WAITING = 20  # seconds on the clock for each of them, where other programs run beside


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="rows to run, in this order: conf/*, timm/resnet*")
    parser.add_argument("--again", action="store_true", help="run rows again that the file holds")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of processor time for a network")
    parser.add_argument("--large", type=int, default=LARGE, help="most weights of networks that are exported")
    parser.add_argument("--memory", type=int, default=MEMORY, help="GiB that a network may take")
    given = parser.parse_args()
    chosen = [key for pattern in given.patterns for key in fnmatch.filter((n.key for n in networks()), pattern)]
    for key in dict.fromkeys(chosen):
        with suppress(_RunsElsewhere), locked(CLAIMS / key, _skip):
            if given.again or key not in read():
                row = run(key, given.seconds, given.large, given.memory)
                enter(key, row)
                print(key, row, flush=True)


class _RunsElsewhere(Exception):
    """Another process runs this row."""


def _skip() -> None:
    raise _RunsElsewhere


def run(key: str, seconds: int, large: int = LARGE, memory: int = MEMORY) -> dict[str, Any]:
    """Returns the cells of a network that runs in a process of its own, which starts with the libraries loaded."""
    start = multiprocessing.get_context("fork")
    receives, sends = start.Pipe(duplex=False)
    process = start.Process(target=_report, args=(key, seconds, large, memory, sends))
    process.start()
    sends.close()
    try:
        if receives.poll(seconds * WAITING):
            return receives.recv()
        return dict.fromkeys(COLUMNS, f"it takes more than {seconds} s")
    except EOFError:  # it ended without a word
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        return dict.fromkeys(COLUMNS, f"it takes more than {seconds} s" if slow else "its process ran out of memory")
    finally:
        process.kill()
        process.join()


def _report(key: str, seconds: int, large: int, memory: int, sends: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.set_num_threads(1)
    try:
        sends.send(cells_of(key, large, memory))
    except Exception as error:  # the network cannot even be built
        sends.send(dict.fromkeys(COLUMNS, f"{type(error).__name__}: {error}"[:200]))


def read() -> dict[str, dict[str, Any]]:
    """Returns the rows so far, by name of the network."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def enter(key: str, row: dict[str, Any]) -> None:
    """Enters a row into the table and its page, beside other processes that do the same."""
    with locked(CLAIMS):
        rows = read() | {key: row}
        write(rows)
        write_text(HERE / "README.md", page(rows))


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Writes the rows, in the order of the networks."""
    place = {network.key: i for i, network in enumerate(networks())}
    ordered = {key: rows[key] for key in sorted(rows, key=lambda k: place.get(k, len(place)))}
    with whole(FILE) as part:
        part.write_text(json.dumps(ordered, indent=1) + "\n")


def reached(row: dict[str, Any], column: str) -> bool:
    """Whether a cell holds what it should: a number, and 0 where codes are compared."""
    value = row.get(column)
    return isinstance(value, int | float) and (column not in ("equal", "onnx", "c99") or value == 0)


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the page: how many networks of each source reach each column, and every row."""
    lines = ["# Coverage", "", f"**Question.** {QUESTION}", "", *__doc__.strip().splitlines()[2:], ""]
    lines += [f"{len(rows)} of the {sum(1 for _ in networks())} networks in the list have been run.", ""]
    lines += ["| networks | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for source in dict.fromkeys(key.split("/")[0] for key in rows):
        mine = [row for key, row in rows.items() if key.startswith(f"{source}/")]
        counts = [f"{sum(reached(row, c) for row in mine)} of {len(mine)}" for c in COLUMNS]
        lines.append(f"| {source} | " + " | ".join(counts) + " |")
    lines += ["", "| network | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    reasons: dict[str, int] = {}
    for key, row in rows.items():
        written = []
        for column in COLUMNS:
            value = row.get(column)
            written.append(
                f"{value}" if not isinstance(value, str) else f"[{reasons.setdefault(value, len(reasons) + 1)}]"
            )
        lines.append(f"| {key} | " + " | ".join(written) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
