"""Lists images with their classes: from folders named by class, a list of labels, or labels in the file names."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from qexp.data.decode import Source
from qexp.errors import QexpError, near

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
_NO_IMAGES = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".xml",
    ".md",
    ".html",
    ".yaml",
    ".yml",
    ".db",
    ".ini",
    ".log",
    ".pdf",
    ".zip",
    ".mat",
)
_SHOWN = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """The classes in index order: `ids` as folders and lists spell them, `names` for people."""

    ids: tuple[str, ...]
    names: tuple[str, ...]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Index by id, and by name if only one class has the name (ImageNet has two cranes)."""
        count = Counter(self.names)
        named = {name: i for i, name in enumerate(self.names) if count[name] == 1}
        return named | {id: i for i, id in enumerate(self.ids)}

    def index(self, spelled: str, where: str) -> int:
        """The index of a class given as id, name or number.

        Raises:
            QexpError: There is no such class; the message names `where` it was given.
        """
        if spelled in self._numbers:
            return self._numbers[spelled]
        if re.fullmatch(r"\d+", spelled) and int(spelled) < len(self.ids):
            return int(spelled)
        allowed = f"0..{len(self.ids) - 1}, or a class such as {self.ids[0]}{near(spelled, [*self.ids, *self.names])}"
        raise QexpError(f"{where}: label {spelled!r} is out of range; use {allowed}")


@dataclass(frozen=True)
class Listing:
    """Images of one split: names below `source` and one label per image, in the order of evaluation."""

    source: Source
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, positions: Sequence[int]) -> Listing:
        """The listing of some of the images."""
        return replace(
            self, names=tuple(self.names[i] for i in positions), labels=tuple(self.labels[i] for i in positions)
        )


def read_classes(path: Path) -> Classes:
    """The classes of a file with one per line: `id`, `id,name` or `index,id,name`, in index order; `n01440764 words` too.

    Raises:
        QexpError: The file is not readable, indices do not count 0, 1, 2, ..., or a class occurs twice.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if all(re.match(r"n\d{8}\s", line) for line in lines):  # WordNet's own lists: words with commas after a blank
        rows = [line.split(maxsplit=1) for line in lines]
    else:
        rows = list(csv.reader(lines))
    if rows and rows[0][0].strip().lower() in ("index", "id", "class"):
        rows = rows[1:]
    if rows and all(len(row) >= 2 and row[0].strip().isdigit() for row in rows):
        for line, row in enumerate(rows):
            if int(row[0]) != line:
                raise QexpError(f"{path}: class {line} is numbered {row[0]}; the indices must count 0, 1, 2, ...")
        rows = [row[1:] for row in rows]
    ids, names = tuple(row[0].strip() for row in rows), tuple(row[-1].strip() for row in rows)
    twice = [name for name, n in Counter(ids).items() if n > 1]
    if twice or not ids:
        raise QexpError(f"{path}: {f'class {twice[0]!r} occurs twice' if twice else 'no classes in it'}")
    return Classes(ids, names)


def read_text(path: Path) -> str:
    """The text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QexpError(f"{path}: cannot be read ({error})") from error


def images(source: Source) -> list[str]:
    """The names of the image files of a source; a warning counts and names files that may be images of another kind."""
    names = source.names()
    found = [name for name in names if name.lower().endswith(SUFFIXES)]
    others = [
        name
        for name in names
        if not name.lower().endswith((*SUFFIXES, *_NO_IMAGES)) and not name.rpartition("/")[2].startswith(".")
    ]
    if found and others:
        log.warning(
            "%s: %d files are skipped, since they end in none of %s: %s",
            source.path,
            len(others),
            ", ".join(SUFFIXES),
            ", ".join(others[:_SHOWN]) + " ..." * (len(others) > _SHOWN),
        )
    if not found:
        raise QexpError(f"{source.path}: no images in it; looked for files ending in {', '.join(SUFFIXES)}")
    return found


def by_folder(source: Source, classes: Classes | None) -> tuple[Listing, Classes]:
    """Images in folders named by class, and the classes: those given, or the folders in sorted order.

    Raises:
        QexpError: An image is outside a class folder, or a folder is not a class or (if folders are the list) holds no image.
    """
    names = images(source)
    loose = [name for name in names if "/" not in name]
    if loose:
        raise QexpError(
            f"{source.path}: {len(loose)} images lie outside a class folder ({', '.join(loose[:_SHOWN])}); put each into "
            "a folder named by its class, or give labels (a list file,class) or label_from (a pattern of the file name)"
        )
    folders = {name.partition("/")[0] for name in names}
    if classes is None:
        if source.path.is_dir():
            there = {p.name for p in source.path.iterdir() if p.is_dir() and not p.name.startswith(".")}
            empty = sorted(there - folders)
            if empty:
                raise QexpError(
                    f"{source.path}: {len(empty)} class folders hold no image: {', '.join(empty[:_SHOWN])}; fill or remove "
                    "them, or give a list of classes, in which a class without images keeps its number"
                )
        ids = tuple(sorted(folders))
        classes = Classes(ids, ids)
    number = {folder: classes.index(folder, f"{source.path / folder}") for folder in sorted(folders)}
    return Listing(source, tuple(names), tuple(number[name.partition("/")[0]] for name in names)), classes


def by_list(source: Source, path: Path, classes: Classes) -> Listing:
    """Images named by a file of lines `file,class`, in its order.

    Raises:
        QexpError: A file is missing, occurs twice or has no label, or a label is out of range.
    """
    rows = [row for row in csv.reader(read_text(path).splitlines()) if row]
    if rows and rows[0][0].strip().lower() in ("file", "image", "filename", "imageid"):
        rows = rows[1:]
    short = next((i for i, row in enumerate(rows) if len(row) < 2), None)
    if short is not None:
        raise QexpError(f"{path}: line {short + 1} is {','.join(rows[short])!r}; file,class is needed")
    names = [row[0].strip() for row in rows]
    there = set(images(source))
    _refuse(path, [n for n in names if n not in there], f"files that are not in {source.path}")
    _refuse(path, [n for n, k in Counter(names).items() if k > 1], "files listed twice")
    _refuse(path, sorted(there - set(names)), f"images of {source.path} without a label")
    return Listing(source, tuple(names), tuple(classes.index(row[1].strip(), f"{path}, {row[0]}") for row in rows))


def by_name(source: Source, pattern: str, classes: Classes) -> Listing:
    """Images whose names hold their class: group 1 of the regular expression `pattern`, as id, name or number.

    Raises:
        QexpError: The pattern does not match a name, or a label is out of range.
    """
    try:
        find = re.compile(pattern)
    except re.error as error:
        raise QexpError(f"label_from={pattern!r} is not a regular expression ({error})") from error
    if find.groups != 1:
        raise QexpError(f"label_from={pattern!r} has {find.groups} groups; one is needed, around the class")
    names = images(source)
    matches = [find.search(name) for name in names]
    _refuse(source.path, [n for n, m in zip(names, matches) if m is None], f"images not matched by {pattern!r}")
    labels = tuple(classes.index(m[1], f"{source.path}, {n}") for n, m in zip(names, matches))
    return Listing(source, tuple(names), labels)


def _refuse(where: Path, names: list[str], what: str) -> None:
    if names:
        raise QexpError(f"{where}: {len(names)} {what}: {', '.join(names[:_SHOWN])}{' ...' * (len(names) > _SHOWN)}")
