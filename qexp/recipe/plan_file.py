"""Reads a plan from a file: a text table with the columns layer, site and bits, checked strictly."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qexp.errors import QexpError, near
from qexp.numerics.widths import FLOAT, width
from qexp.recipe.plan import Source

log = logging.getLogger(__name__)

NEEDED = ("layer", "site", "bits")
ARRIVES = "quantized at "  # start of the `rule` column of a tensor that arrives quantized; only the message uses it
LARGEST = 1 << 26  # bytes of a plan
SHOWN = 3


@dataclass(frozen=True)
class Row:
    """One tensor of a plan: its line in the file, its width, and its other columns."""

    line: int
    bits: int
    said: dict[str, str]


def read_rows(path: Path, layers: list[str]) -> dict[tuple[str, str], Row]:
    """Returns the rows of a `layers.csv` by (layer, site), without tensors that arrive quantized.

    Raises:
        QexpError: The file is missing or is not a table, columns are missing, a layer is unknown, a width is not allowed, or a
            tensor has two rows.
    """
    cells = _cells(path)
    (_, head), *lines = cells or [(1, [])]
    missing = set(NEEDED) - set(head)
    if missing:
        separator = next((mark for mark in ";\t|" if any(mark in name for name in head)), None)
        hint = f"; its cells are separated by {separator!r}: save it with commas" if separator else ""
        raise QexpError(
            f"plan={path}: columns {', '.join(sorted(missing))} are missing; a plan is the layers.csv of a run{hint}"
        )
    if twice := [name for name, count in Counter(head).items() if count > 1]:
        raise QexpError(f"plan={path}: column {twice[0]!r} occurs twice; remove one")
    out: dict[tuple[str, str], Row] = {}
    arriving: dict[tuple[str, str], Row] = {}
    for line, row in lines:
        if len(row) != len(head):
            raise QexpError(f"plan={path}, line {line}: {len(row)} cells; the table has {len(head)} columns")
        said = dict(zip(head, row))
        key = (said.pop("layer"), said.pop("site"))
        bits = _bits(said.pop("bits"), f"plan={path}: {key[0]} ({key[1]}), bits", key[1])
        # files of earlier versions have no source column: a float tensor with fewer than 32 bits arrived quantized
        arrives = said.get(
            "source",
            Source.ARRIVES.value
            if said.get("quantizer") == "float" and bits < FLOAT and key[1].startswith("input")
            else "",
        ) == (Source.ARRIVES.value)
        if key[0] not in layers and not arrives:
            raise QexpError(f"plan={path}: the model has no layer {key[0]!r}{near(key[0], layers)}")
        if earlier := out.get(key) or arriving.get(key):
            raise QexpError(
                f"plan={path}: {key[0]} ({key[1]}) is on lines {earlier.line} and {line}; keep one row per tensor"
            )
        (arriving if arrives else out)[key] = Row(line, bits, said)
    _tell_ignored(path, out, arriving)
    return out


def _cells(path: Path) -> list[tuple[int, list[str]]]:
    """Returns the cells of each line that has any, with its number."""
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise QexpError(f"plan={path}, line {reader.line_num}: cannot be read as a table ({error})") from None


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise QexpError(f"plan={path}: cannot be read: it is a folder; name the layers.csv in it")
        if path.exists() and not path.is_file():
            raise QexpError(f"plan={path}: cannot be read: it is not a regular file; save the plan as a file")
        if path.stat().st_size > LARGEST:
            raise QexpError(
                f"plan={path}: cannot be read: {path.stat().st_size:,} bytes; a plan has {LARGEST:,} at most"
            )
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise QexpError(f"plan={path}: cannot be read ({error})") from None
    if not content.strip():
        raise QexpError(f"plan={path}: cannot be read: it is empty")
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        raise QexpError(f"plan={path}: cannot be read: it is compressed; unpack it first")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise QexpError(f"plan={path}: cannot be read: it is text in UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QexpError(f"plan={path}: cannot be read: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise QexpError(f"plan={path}: cannot be read: it is binary; a plan is a table of text, layers.csv of a run")
    return text


def _bits(text: str, where: str, site: str) -> int:
    whole = text.removesuffix(".0")
    return width(int(whole) if whole.isascii() and whole.isdecimal() and len(whole) < 9 else text, where, site)


def _tell_ignored(path: Path, rows: dict[tuple[str, str], Row], arriving: dict[tuple[str, str], Row]) -> None:
    """Logs widths without effect: the tensor arrives quantized with another width than the file has for it."""
    told = []
    for (layer, site), row in arriving.items():
        source = row.said.get("rule", "").removeprefix(ARRIVES).removesuffix(" (output)")
        given = rows.get((source, "output"))
        if given is not None and given.bits != row.bits:
            told.append(f"{layer} ({site}) {row.bits} bits, which arrives with the {given.bits} of {source} (output)")
    if told:
        log.warning("plan=%s: ignored: %s%s", path, "; ".join(told[:SHOWN]), _more(told))


def tell_differences(
    path: Path, rows: dict[tuple[str, str], Row], decided: dict[tuple[str, str], dict[str, str]]
) -> None:
    """Logs, in one line, the columns of a plan that the run does not use: the plan decides widths, the recipe all else.

    Args:
        path: The plan's file.
        rows: The plan's rows.
        decided: The run's own values for each tensor, by column.
    """
    told = []
    for key, row in rows.items():
        for column in ("quantizer", "granularity"):
            said, has = row.said.get(column), decided.get(key, {}).get(column)
            if said and has and said != has:
                told.append(f"{key[0]} ({key[1]}) {column}: file {said}, run {has}")
    if told:
        log.info("plan=%s: only its bits are read; the recipe decides %s%s", path, "; ".join(told[:SHOWN]), _more(told))


def _more(told: list[str]) -> str:
    return f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
