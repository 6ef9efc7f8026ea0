"""What a value of `weights` names: a file, a run folder, published weights, a URL or a network of the zoo. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from qexp.errors import QexpError, near
from qexp.results import zoo

RANDOM = "random"  # fresh weights, which nothing trains


def is_address(source: str) -> bool:
    """Returns whether weights are to be downloaded from a URL."""
    return re.match(r"https?://", source) is not None


def is_published(source: str) -> bool:
    """Returns whether weights have the form of a name that timm or torchvision publishes: `DEFAULT`, `ResNet18_Weights.IMAGENET1K_V1`."""
    return re.fullmatch(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*", source) is not None


def check_there(source: str) -> None:
    """Raises if weights can only be a file or a folder, and neither exists.

    Raises:
        QexpError: Nothing lies there; the message names the nearest file.
    """
    if zoo.name_of(source) is not None:
        return
    try:
        is_there = Path(source).exists()
    except OSError as error:  # a name too long for a file
        raise QexpError(f"weights={source[:100]}: cannot be read ({error.strerror})") from error
    if not is_there and not is_address(source) and not is_published(source):
        raise _not_found(source)


def _not_found(source: str) -> QexpError:
    folder = Path(source).parent
    try:
        known = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    except OSError:  # a folder that may not be listed
        known = []
    where = "" if known else f"; the folder {folder} is empty or not there"
    return QexpError(
        f"weights={source}: no such file{near(Path(source).name, known)}{where}. Allowed: a file, a run folder, a "
        f"torchvision weight name such as IMAGENET1K_V1, zoo:NAME, https://...#sha256=<hex>, or random"
    )
