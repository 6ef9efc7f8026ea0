"""The table on the project's first page, from the studies' own tables: `python -m experiments.fill README.md`.

Each row names a study and a column of one of its tables; the best method of that column is shown, whichever it is when the study is run
again. Nothing is measured here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """A column of a study's table.

    Attributes:
        network, how: What was quantized, and whether it was trained.
        study, width: The folder, and the column: `W4A4`; of `records`, the row.
        under: Words of the heading, or of the line before the table, where a study has tables of several networks.
    """

    network: str
    how: str
    study: str
    width: str
    under: str = ""


RESNET, SQUEEZE = "ResNet-20, CIFAR-10 (10,000 images)", "SqueezeNet 1.1, ImageNet classes (600)"
MOBILE, FACE, DETECT = (
    "MobileNetV2, ImageNet classes (600)",
    "MobileFaceNet, LFW (1,044 pairs)",
    "YOLOv3-Nano, VOC2012 (100 images, mAP)",
)
ROWS = (
    Row(RESNET, "post-training", "ptq_ladder", "W4A8"),
    Row(RESNET, "post-training", "ptq_ladder", "W4A4"),
    Row(RESNET, "post-training", "ptq_ladder", "W2A8"),
    Row(RESNET, "trained, 5 epochs", "low_bit_resnet20", "W4A4"),
    Row(RESNET, "trained", "records", "W4A4"),
    Row(RESNET, "trained", "records", "W3A3"),
    Row(RESNET, "trained, 20 epochs", "low_bit_resnet20", "W2A2", under="20 epochs (7,660 steps)"),
    Row(RESNET, "trained", "records", "W1A2"),
    Row(SQUEEZE, "post-training", "imagenet_sample", "W6A6", under="## SqueezeNet"),
    Row(MOBILE, "post-training", "mobilenet_collapse", "W6A6"),
    Row(MOBILE, "post-training", "mobilenet_collapse", "W4A4"),
    Row(MOBILE, "post-training, searched bits", "search", "W5A6", under="## MobileNetV2"),
    Row(FACE, "post-training", "faces", "W4A4", under="Accuracy in percent"),
    Row(DETECT, "post-training", "detection", "W6A6", under="The same on 100 VOC2012 images"),
)


def table(rows: tuple[Row, ...] = ROWS, folder: Path = HERE) -> str:
    """Returns the Markdown table: the best method of each row's column, its score with half its 95 % interval, float, and the study."""
    lines = [
        "| network, test images | quantization | bits | best method | score (%) | float (%) | study |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        text, how = (folder / row.study / "README.md").read_text(), row.how
        if row.study == "records":
            method, epochs, cell, reference = recorded(text, row.width)
            how += f", {epochs} epochs"
        else:
            method, cell, reference = best(text, row)
        lines.append(
            f"| {row.network} | {how} | {row.width} | {method} | {cell} | {reference} | [{row.study}](experiments/{row.study}) |"
        )
    return "\n".join(lines)


def recorded(text: str, width: str) -> tuple[str, str, str, str]:
    """Returns method, epochs, score and float score of the long training to a width.

    Raises:
        ValueError: There is none.
    """
    for line in text.splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if len(words) == 8 and words[0].endswith(f" {width}"):
            run, epochs, _, score, reference, *_ = words
            return " ".join(run.split()[1:-1]), epochs, score, reference
    raise ValueError(f"experiments/records/README.md: no training to {width}")


def best(text: str, row: Row) -> tuple[str, str, str]:
    """Returns method and score of the best cell in a row's column, and the float score.

    Raises:
        ValueError: The study has no such table, no score in it, or float's neither below it nor in its heading.
    """
    here = text[text.find(row.under) :] if row.under in text else ""
    for head in re.finditer(r"^\| method \|(.*)\|\n\|[-|]+\|\n((?:\|.*\n)+)\s*(?:float ([\d.]+))?", here, re.M):
        widths = [word.strip() for word in head[1].split("|")]
        if row.width in widths:
            break
    else:
        raise ValueError(f"experiments/{row.study}/README.md: no table with a column {row.width} after {row.under!r}")
    scores = {}
    for line in head[2].splitlines():
        method, *cells = [word.strip() for word in line.strip("|").split("|")]
        cell = cells[widths.index(row.width)]
        if number := re.match(r"[\d.]+", cell):
            scores[float(number[0])] = method, cell
    reference = head[3] or next(iter(re.findall(r"float ([\d.]+)", here.split("\n", 1)[0])), None)
    if not scores or reference is None:
        raise ValueError(
            f"experiments/{row.study}/README.md: the table after {row.under!r} has no score, or no line of float's"
        )
    return *scores[max(scores)], reference


if __name__ == "__main__":
    print(table())
