"""Which networks quantize, fold, lower, prove equal and export: `python -m experiments.coverage [PATTERN ...]`.

Writes `coverage.json` beside this file after each network, in a process of its own with limits on time and memory, and the table into
`README.md`. A network that is in the file is not run again, unless `--again` is given. Columns:

* quantize: percentage of products that stay in float at 8 bits, with `deploy=integer`;
* fold: batch norms that are left; the float result moved by less than 1e-4;
* lower: operations of the integer program;
* equal: codes that differ between the program and the network with the program's rounding, on two images;
* onnx: codes and scores that differ between onnxruntime and the program, with `deploy=int8`;
* c99: scores that differ between the compiled package and the program.

A cell without a number holds the reason. The images are random float numbers. Rows with differing codes in the column `onnx` come from runs
before the file encoded images in the program's order; googlenet of `conf` and resnet26d of `timm`, which had some, were run again and have
none. The cause of the others was not examined.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from experiments.coverage.networks import networks
from experiments.coverage.one import COLUMNS, cells_of
from qexp.system.whole_files import whole

HERE = Path(__file__).parent
FILE = HERE / "coverage.json"
QUESTION = "Which networks quantize, fold, lower to integers that are proven equal, and export, as they are?"
SECONDS = 240  # of processor time
WAITING = 20  # seconds on the clock for each of them, where other programs run beside


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="rows to run: conf/*, timm/resnet*")
    parser.add_argument("--again", action="store_true", help="run rows again that the file holds")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of processor time for a network")
    given = parser.parse_args()
    for network in networks():
        held = read()
        if not any(fnmatch(network.key, p) for p in given.patterns) or (network.key in held and not given.again):
            continue
        held[network.key] = run(network.key, given.seconds)
        write(held)
        print(network.key, held[network.key], flush=True)
    (HERE / "README.md").write_text(page(read()))


def run(key: str, seconds: int) -> dict[str, Any]:
    """Returns the cells of a network that runs in a process of its own, which starts with the libraries loaded."""
    start = multiprocessing.get_context("fork")
    receives, sends = start.Pipe(duplex=False)
    process = start.Process(target=_report, args=(key, seconds, sends))
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


def _report(key: str, seconds: int, sends: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.set_num_threads(1)
    try:
        sends.send(cells_of(key))
    except Exception as error:  # the network cannot even be built
        sends.send(dict.fromkeys(COLUMNS, f"{type(error).__name__}: {error}"[:200]))


def read() -> dict[str, dict[str, Any]]:
    """Returns the rows so far, by name of the network."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


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
