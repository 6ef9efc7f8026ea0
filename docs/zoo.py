"""Writes the page of the zoo from the cards of its entries: score with interval, size, published row, command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from qexp.results import zoo
from qexp.results.measure import Measure
from qexp.results.wording import asked

ROOT = Path(__file__).parents[1]
HEAD = """# Zoo

Finished networks, each a folder of `zoo/`: weights at their own bits, the integer program, golden vectors, and a card with the command,
the seed and the score. No image of a data set is in it; golden vectors are of made-up images.

    qexp check zoo:resnet20_w4a4_qdrop               # hashes, golden vectors, program, score on a sample
    qexp check zoo:all --images all                  # every entry, on all test images
    python run.py weights=zoo:resnet20_w8a8 model=resnet20 dataset=cifar10 quant=mse bits=w4a4     # start from its weights
    python run.py export=package weights=zoo:resnet20_w4a4_qdrop                                   # C99 code, ONNX, ...
    python -m experiments.zoo add RUN_FOLDER NAME --published 91.6 --source "someone 2020"         # make a finished run an entry

In Python, `qexp.load("zoo:resnet20_w4a4_qdrop")` returns the quantized network.

Scores are of all test samples that the card names, with the 95 % interval; *integers*: the same score by the integer program.
*Published* is the row that a paper or a project has for this network and these widths, where there is one; its method and its float
network may be others.
"""


def on_files(files: Files, config: Any) -> Files:
    """Adds the page."""
    cards = [json.loads((ROOT / "zoo" / name / zoo.CARD).read_text()) for name in zoo.names(ROOT / "zoo")]
    files.append(File.generated(config, "zoo.md", content=page(cards)))
    return files


def page(cards: list[Mapping[str, Any]]) -> str:
    """Returns the page of these cards."""
    total = sum(card["bytes"] for card in cards)
    parts = [HEAD, f"{len(cards)} entries, {total / 1e6:.1f} MB.\n"]
    for dataset in sorted({card["dataset"] for card in cards}):
        rows = [_row(card) for card in cards if card["dataset"] == dataset]
        head = f"## {dataset}\n\n| entry | network | bits | method | score | float | integers | kB | published |"
        parts.append("\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows]) + "\n")
    commands = [f"    {card['command']}        # {card['name']}, seed {card['seed']}" for card in cards]
    return "\n".join([*parts, "## Commands\n", *commands]) + "\n"


def _row(card: Mapping[str, Any]) -> str:
    score, measure = card["score"], Measure.of(card["score"])
    half = (score["ci_high"] - score["ci_low"]) / 2 if score["ci_low"] is not None else None
    value = measure.number(score["value"]) + ("" if half is None else f" ± {measure.number(half)}")
    base = "" if card["value_float"] is None else measure.number(card["value_float"])
    integers = score.get("integer")
    published = card["published"]
    cells = [
        f"`{card['name']}`",
        card["model"],
        asked(card),
        card["quant"],
        f"{measure.label} {value} {measure.unit} ({score['n']})",
        base,
        measure.number(integers["value"]) if integers else "no program",
        f"{card['bytes'] / 1000:.0f}",
        f"{published['value']:g} ({published['source']})" if published else "",
    ]
    return f"| {' | '.join(cells)} |"
