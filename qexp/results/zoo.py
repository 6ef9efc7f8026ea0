"""The zoo: finished networks as small packages, one folder each, whose files are checked by their hashes before anything is read.

zoo/SHA256SUMS                  hash of every file of every entry (sha256sum -c reads it)
zoo/NAME/card.json              what it is: the command, seed, score with interval, published row, hash of each other file
zoo/NAME/config.yaml            the configuration of the run; places of data are left open
zoo/NAME/network.safetensors.xz the network: weights as codes with their steps or levels, the rest in float
zoo/NAME/program.json.xz        its integer program, where it has one; constants.safetensors.xz holds the arrays that the network lacks
zoo/NAME/golden.safetensors.xz  made-up images, what simulation and integers compute of them, and which test samples are right
zoo/NAME/files/                 files that the network is built from
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as read_tensors

from qexp.errors import QexpError, near

PREFIX = "zoo:"
CARD, SUMS, CONFIG, FILES = "card.json", "SHA256SUMS", "config.yaml", "files"
NETWORK, PROGRAM = "network.safetensors.xz", "program.json.xz"
CONSTANTS, GOLDEN = "constants.safetensors.xz", "golden.safetensors.xz"
FORMAT, VERSION = "qexp zoo entry", 1
LARGEST = 1 << 26  # bytes that a file may unpack to
DATA, OWN = "$QEXP_DATA_DIR", "$ZOO"  # how texts of a configuration begin that name files of the user, and of the entry
_CARD = {"name": str, "model": str, "dataset": str, "command": str, "seed": int, "score": dict, "files": dict}


def name_of(source: Any) -> str | None:
    """Returns NAME of `zoo:NAME`; None for any other source."""
    text = str(source)
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def root() -> Path:
    """Returns the zoo: `$QEXP_ZOO`, or the folder in the package (a wheel) or beside it (a clone), or `zoo` where the user stands."""
    if os.environ.get("QEXP_ZOO"):
        return Path(os.environ["QEXP_ZOO"])
    package = Path(__file__).parents[1]
    return next((folder for folder in (package / "zoo", package.parent / "zoo") if folder.is_dir()), Path("zoo"))


def names(folder: Path | None = None) -> list[str]:
    """Returns the names of all entries."""
    return sorted(card.parent.name for card in (folder or root()).glob(f"*/{CARD}") if card.parent.name[0] != ".")


def find(name: str, folder: Path | None = None) -> Path:
    """Returns the folder of an entry.

    Raises:
        QexpError: There is no such entry; the message names those that come near.
    """
    place, known = folder or root(), names(folder)
    if name not in known:
        has = f"it has {', '.join(known)}" if known else f"{place} holds no entries; QEXP_ZOO names another folder"
        raise QexpError(f"{PREFIX}{name}: the zoo has no such entry{near(name, known, prefix=PREFIX)}; {has}")
    return place / name


@dataclass(frozen=True)
class Entry:
    """One network of the zoo, after the check of its files.

    Attributes:
        folder: Its folder.
        card: What `card.json` says of it.
    """

    folder: Path
    card: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name as it is typed."""
        return f"{PREFIX}{self.card['name']}"

    @property
    def has_program(self) -> bool:
        """Whether it has an integer program."""
        return PROGRAM in self.card["files"]

    def config(self) -> dict[str, Any]:
        """Returns the configuration of its run, with the places of this machine."""
        data = os.environ.get("QEXP_DATA_DIR", "data")
        return placed(yaml.safe_load((self.folder / CONFIG).read_text()), {DATA: data, OWN: str(self.folder)})

    def arrays(self, file: str) -> dict[str, NDArray]:
        """Returns the arrays of one of its files."""
        try:
            return read_tensors(unpacked(self.folder / file))
        except SafetensorError as error:
            raise QexpError(f"{self.folder / file}: damaged ({error}); restore the entry") from None

    def network(self) -> tuple[dict[str, Any], dict[str, NDArray]]:
        """Returns the description of its network, and the arrays that hold its tensors."""
        arrays = self.arrays(NETWORK)
        return json.loads(arrays.pop("about").tobytes()), arrays

    def program(self) -> dict[str, Any]:
        """Returns the description of its integer program."""
        return json.loads(unpacked(self.folder / PROGRAM))


def read(source: str, folder: Path | None = None) -> Entry:
    """Returns an entry, `zoo:NAME` or NAME, after comparing each of its files with `SHA256SUMS` and with its card.

    Raises:
        QexpError: There is no such entry, or a file is missing, changed or not listed. The message names the file.
    """
    place = find(name_of(source) or source, folder)
    listed = {
        name.removeprefix(f"{place.name}/"): said
        for name, said in sums(place.parent).items()
        if name.startswith(f"{place.name}/")
    }
    if CARD not in listed:
        raise QexpError(f"{place.parent / SUMS} does not list {place.name}/{CARD}; restore both files")
    return checked(place, listed)


def checked(place: Path, listed: Mapping[str, str] | None = None) -> Entry:
    """Returns the entry of a folder after comparing its files with the hashes in a list, and with those on its card."""
    card = _card(place, listed or {})
    said = {CARD: (listed or {}).get(CARD), **card["files"]}
    there = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    for name in sorted({*said, *(listed or {}), *there} - {CARD}):
        path = place / name
        if name not in there:
            raise QexpError(f"{path} is missing; restore the entry")
        if name not in said or (listed is not None and name not in listed):
            raise QexpError(f"{path} is not listed {'on the card' if name not in said else f'in {SUMS}'}; remove it")
        now = sha256(path)
        if listed is not None and now == said[name] != listed[name]:
            raise QexpError(f"{place.parent / SUMS} was changed: the card of {place.name} confirms {name}; restore it")
        if now != said[name]:
            raise QexpError(f"{path} was changed since the entry was made (SHA-256 differs); restore the entry")
    return Entry(place, card)


def _card(place: Path, listed: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a card says, after checking its hash and its form."""
    path = place / CARD
    if listed and listed[CARD] != sha256(path):
        raise QexpError(f"{path} was changed since the entry was made, or {SUMS} was (SHA-256 differs); restore both")
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise QexpError(f"{path}: cannot be read ({str(error)[:200]}); restore the entry") from None
    if not isinstance(card, dict) or (card.get("format"), card.get("version")) != (FORMAT, VERSION):
        raise QexpError(f"{path}: not the card of a {FORMAT} of version {VERSION}; this qexp reads no other")
    wrong = [key for key, kind in _CARD.items() if not isinstance(card.get(key), kind)]
    if wrong or card["name"] != place.name.removeprefix("."):
        raise QexpError(f"{path}: {wrong[0] if wrong else 'name'} is not what it should be; restore the entry")
    return card


def content(source: str) -> str:
    """Returns the hash of an entry's content: that of its card, which holds those of all its other files."""
    return sha256(find(name_of(source) or source) / CARD)


def sums(folder: Path) -> dict[str, str]:
    """Returns the hash of each file that `SHA256SUMS` lists, by `NAME/file`."""
    path = folder / SUMS
    try:
        rows = [line.split("  ", 1) for line in path.read_text().splitlines() if line.strip()]
        return {name: said for said, name in rows}
    except (OSError, ValueError) as error:
        raise QexpError(f"{path}: cannot be read ({error}); restore it") from None


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compressed(content: bytes) -> bytes:
    """Returns content as it is stored."""
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)


def unpacked(path: Path) -> bytes:
    """Returns the content of a compressed file.

    Raises:
        QexpError: It is damaged, or unpacks to more than any entry needs.
    """
    try:
        reader = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        content = reader.decompress(path.read_bytes(), LARGEST)
    except (OSError, lzma.LZMAError) as error:
        raise QexpError(f"{path}: damaged ({error}); restore the entry") from None
    if not reader.eof:
        raise QexpError(f"{path}: cut short, or unpacks to more than {LARGEST:,} bytes; restore the entry")
    return content


def placed(node: Any, places: Mapping[str, str]) -> Any:
    """Returns a configuration whose texts that begin with a name of a place begin with the place instead."""
    if isinstance(node, Mapping):
        return {key: placed(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [placed(value, places) for value in node]
    if isinstance(node, str):
        for name, place in places.items():
            if node == name or node.startswith(f"{name}/"):
                return place + node[len(name) :]
    return node


def as_array(document: Any) -> NDArray[np.uint8]:
    """Returns a JSON document as an array of bytes."""
    return np.frombuffer(json.dumps(document).encode(), np.uint8)
