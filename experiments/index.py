"""All studies in one table, from their pages: `python -m experiments.fill experiments/README.md`.

A study's question is the text after **Question.** on its page; rows are those of its table of published figures, counted by verdict.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
VERDICTS = ("not run", "reproduced", "better", "worse")


def table(folder: Path = HERE) -> str:
    """Returns one row a study: its question, and how many published figures were run and how they came out."""
    lines = ["| study | question | published rows | run | reproduced | better | worse |", "|---" * 7 + "|"]
    for page in sorted(folder.glob("*/README.md")):
        text = page.read_text()
        question = re.search(r"\*\*Question\.\*\*\s*(.*?)\n\n", text, re.S)
        if question is None:
            raise ValueError(f"{page}: no **Question.**")
        counts = verdicts(text)
        numbers = [
            counts["rows"],
            counts["rows"] - counts["not run"],
            *(counts[verdict] for verdict in VERDICTS[1:]),
        ]
        cells = [str(n) if counts["rows"] else "" for n in numbers]
        lines.append(
            f"| [{page.parent.name}]({page.parent.name}) | {' '.join(question[1].split())} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def verdicts(text: str) -> dict[str, int]:
    """Returns how many rows of a page's tables of published figures there are, and how many of each verdict."""
    counts = dict.fromkeys(("rows", *VERDICTS), 0)
    for body in re.findall(r"^\| network \| method \| bits \| published.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M):
        for row in body.splitlines():
            counts["rows"] += 1
            for verdict in VERDICTS:
                counts[verdict] += f"| {verdict}" in row
    return counts


if __name__ == "__main__":
    print(table())
