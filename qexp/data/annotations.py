"""Reads and checks the objects of a detection set's pictures, from VOC's XML or from a table."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qexp.errors import QexpError, near

VOC_CLASSES = (
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
    ),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CORNERS = {"pixels": 1.0, "as_given": 0.0}
COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax", "class")


class Objects(NamedTuple):
    """The objects of a picture: boxes `[n, 4]` (corners in pixels, from 0), labels `[n]`, difficult `[n]`."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class Row(NamedTuple):
    """One object as in its file: corners counted from 1, both pixels inside."""

    corners: tuple[float, float, float, float]
    name: str
    difficult: bool
    where: str


def read_xml(path: Path) -> list[Row]:
    """Returns the objects of one VOC annotation file, without parts of objects.

    Raises:
        QexpError: The file is damaged.
    """
    try:
        root = ET.parse(path).getroot()
        rows = []
        for item in root.iter("object"):
            box = item.find("bndbox")
            corners = tuple(float(box.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = (item.findtext("difficult") or "0").strip() == "1"
            rows.append(Row(corners, item.findtext("name", "").strip(), difficult, str(path)))
        return rows
    except (ET.ParseError, AttributeError, TypeError, ValueError, OSError) as error:
        raise QexpError(f"{path}: no readable VOC annotation ({error}); fetch it again") from error


def read_table(path: Path) -> dict[str, list[Row]]:
    """Returns, by image, the objects of a table with columns image, xmin, ymin, xmax, ymax, class and optionally difficult.

    Raises:
        QexpError: The file or a column is missing, or a row is not a box.
    """
    if not path.is_file():
        raise QexpError(f"{path}: no such file; the boxes of the images are read from it")
    out: dict[str, list[Row]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
        if missing:
            raise QexpError(f"{path}: no column {', '.join(missing)}; needed are {', '.join(COLUMNS)}")
        for number, row in enumerate(table, 2):
            try:
                corners = tuple(float(row[side]) for side in COLUMNS[1:5])
            except (TypeError, ValueError):
                raise QexpError(f"{path}, line {number}: {dict(row)} has no four numbers for a box") from None
            difficult = (row.get("difficult") or "0").strip() in ("1", "true", "True")
            one = Row(corners, (row["class"] or "").strip(), difficult, f"{path}, line {number}")
            out.setdefault(row["image"], []).append(one)
    return out


def objects(
    rows: Sequence[Row], size: tuple[int, int], classes: Sequence[str], corners: str, tally: Counter
) -> Objects:
    """Returns a picture's objects with corners counted from 0; adds changed and dropped boxes to the counts in `tally`.

    A box that reaches over the edge is clipped at it; a box that is empty, before or after, is dropped.

    Args:
        rows: Rows of the file.
        size: Width and height of the picture in pixels.
        classes: Names in the order of their labels.
        corners: `pixels`: the first and the last pixel belong to the box, as VOC counts, so that it spans `xmin - 1 .. xmax`;
            `as_given`: the numbers are taken as coordinates.
        tally: Counts of `clipped_boxes`, `empty_boxes`, `difficult_boxes`.

    Raises:
        QexpError: A class is not among `classes`, or a corner is not a finite number.
    """
    shift = CORNERS[corners]
    boxes, labels, difficult = [], [], []
    for row in rows:
        if row.name not in classes:
            raise QexpError(f"{row.where}: class {row.name!r}{near(row.name, classes)}; known are {', '.join(classes)}")
        box = torch.tensor(row.corners) - torch.tensor([shift, shift, 0.0, 0.0])
        if not bool(box.isfinite().all()):
            raise QexpError(f"{row.where}: corners {row.corners}; finite numbers are needed")
        inside = box.clamp(min=0).minimum(torch.tensor([*size, *size], dtype=torch.float32))
        if bool((inside[2:] <= inside[:2]).any()):
            tally["empty_boxes"] += 1
            continue
        tally["clipped_boxes"] += int(not torch.equal(inside, box))
        tally["difficult_boxes"] += int(row.difficult)
        boxes.append(inside)
        labels.append(list(classes).index(row.name))
        difficult.append(row.difficult)
    return Objects(
        torch.stack(boxes) if boxes else torch.zeros(0, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )
