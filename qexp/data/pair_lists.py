"""Lists of face pairs: two images, whether they show the same person, and the fold."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qexp.errors import QexpError

log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Two images by name, whether they show the same person, and the fold (from 0) the pair is judged in."""

    a: str
    b: str
    same: bool
    fold: int


def read_pairs(path: Path) -> list[Pair]:
    """Returns the pairs of a list, in order, each once.

    Two forms are read: the official `pairs.txt` (a line `folds count`, then for each fold `count` lines `name i j` and as many lines
    `name i other j`), and a CSV of lines `fold,a,b,same`. A pair that occurs twice counts once and is reported.

    Raises:
        QexpError: The file is missing, a line has neither form, the list is cut short or empty, an image is paired with itself, or a
            pair is marked both as one person and as two.
    """
    if not path.is_file():
        raise QexpError(f"pairs={path}: no such file; it is the list of face pairs (pairs.txt, or lines fold,a,b,same)")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise QexpError(f"{path}: is not text ({error}); pairs.txt, or lines fold,a,b,same are needed") from None
    pairs = _csv(path, lines) if "," in lines[0] else _official(path, lines)
    if not pairs:
        raise QexpError(f"{path}: no pairs in it; pairs.txt, or lines fold,a,b,same are needed")
    once, seen, kinds = [], set(), {}
    for pair in pairs:
        images = tuple(sorted((pair.a, pair.b)))
        if pair.a == pair.b:
            raise QexpError(
                f"{path}: {pair.a} is paired with itself, which any network judges correctly; remove the pair"
            )
        if kinds.setdefault(images, pair.same) != pair.same:
            raise QexpError(
                f"{path}: {pair.a} and {pair.b} are marked both as one person and as two people; correct the list"
            )
        key = (pair.fold, *images)
        if key not in seen:
            seen.add(key)
            once.append(pair)
    if len(once) < len(pairs):
        log.warning("%s: %d pairs occur twice in their fold; each counts once", path, len(pairs) - len(once))
    return once


def _csv(path: Path, lines: list[str]) -> list[Pair]:
    pairs = []
    for number, row in enumerate(csv.reader(line for line in lines if line.strip()), 1):
        if number == 1 and row[0].strip().lower() == "fold":
            continue
        try:
            fold, a, b, same = row
            if same.strip() not in ("0", "1"):
                raise ValueError
            pairs.append(Pair(a.strip(), b.strip(), same.strip() == "1", int(fold)))
        except ValueError:
            raise QexpError(
                f"{path}, line {number}: got {','.join(row)!r}; allowed is fold,a,b,same with same 0 or 1"
            ) from None
    return pairs


def _official(path: Path, lines: list[str]) -> list[Pair]:
    head, *rows = [line.split() for line in lines if line.strip()] or [[]]
    try:
        folds, count = (int(head[0]), int(head[1])) if len(head) > 1 else (1, int(head[0]))
    except (ValueError, IndexError):
        raise QexpError(
            f"{path}, line 1: got {' '.join(head)!r}; pairs.txt begins with the number of folds and of pairs"
        ) from None
    if len(rows) != 2 * folds * count:
        raise QexpError(
            f"{path}: {len(rows)} pairs, but its first line promises {2 * folds * count}; it is cut short or another list"
        )
    pairs = []
    for i, row in enumerate(rows):
        try:
            if len(row) not in (3, 4):
                raise ValueError
            if len(row) == 3:
                names = (row[0], row[1]), (row[0], row[2])
            else:
                names = (row[0], row[1]), (row[2], row[3])
            a, b = (f"{name}/{name}_{int(n):04d}.jpg" for name, n in names)
        except (ValueError, IndexError):
            raise QexpError(
                f"{path}, line {i + 2}: got {' '.join(row)!r}; allowed is `name i j` or `name i other j`"
            ) from None
        pairs.append(Pair(a, b, len(row) == 3, i // (2 * count)))
    return pairs


def set_aside(pairs: list[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Returns `count` pairs, half of them of the same person, and the remaining pairs that share no image with them."""
    generator = np.random.default_rng(seed)
    chosen = []
    for same in (True, False):
        kind = [p for p in pairs if p.same == same]
        if len(kind) < count - count // 2:
            raise QexpError(
                f"held_out={count}: the list has only {len(kind)} pairs of {'one person' if same else 'two people'}"
            )
        order = generator.permutation(len(kind))
        chosen += [kind[i] for i in order[: count // 2 if same else count - count // 2]]
    taken = {name for p in chosen for name in (p.a, p.b)}
    return chosen, [p for p in pairs if p.a not in taken and p.b not in taken]


def every_kind(pairs: list[Pair], count: int | None) -> list[Pair]:
    """Returns a number of pairs in their order: the first of each fold and kind, then the second, and so on; None is all.

    A list has a fold's pairs of one person before those of two people, so its beginning alone would hold only one answer.
    """
    turns: dict[tuple[int, bool], int] = {}
    order = []
    for place, pair in enumerate(pairs):
        kind = (pair.fold, pair.same)
        turns[kind] = turns.get(kind, -1) + 1
        order.append((turns[kind], place))
    return [pairs[place] for place in sorted(place for _, place in sorted(order)[:count])]


def make_pairs(names: list[str], count: int, seed: int) -> list[Pair]:
    """Returns `count` pairs of these images, half of them of one person (the folder is the person)."""
    generator = np.random.default_rng(seed)
    people: dict[str, list[str]] = {}
    for name in names:
        people.setdefault(Path(name).parent.name, []).append(name)
    several = [images for images in people.values() if len(images) > 1]
    everyone = list(people.values())
    pairs = []
    if len(everyone) < 2:
        raise QexpError(
            f"held_out={count}: the images outside the list show {len(everyone)} person; give held_out=0 or more images"
        )
    for i in range(count):
        if i % 2 == 0 and several:
            a, b = generator.choice(several[generator.integers(len(several))], 2, replace=False)
        else:
            one, other = generator.choice(len(everyone), 2, replace=False)
            a, b = generator.choice(everyone[one]), generator.choice(everyone[other])
        pairs.append(Pair(str(a), str(b), Path(a).parent == Path(b).parent, 0))
    return pairs
