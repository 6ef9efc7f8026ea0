"""Names and patterns of layers: `fnmatch` on module names, and a few words that name layers by their place."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from qexp.errors import QexpError, near


class NoSuchLayer(QexpError):
    """A pattern that names no layer; `pattern` holds it."""

    def __init__(self, message: str, pattern: str) -> None:
        super().__init__(message)
        self.pattern = pattern


def match(
    patterns: str | Sequence[str],
    layers: Sequence[str],
    where: str,
    places: dict[str, Sequence[str]],
    optional: bool = False,
) -> list[str]:
    """Returns the layers that any of the patterns names, in model order.

    Args:
        patterns: `fnmatch` patterns on module names, or a place: `@first`, `@last`, `@ends`.
        layers: Names of all layers that can carry quantizers.
        where: The setting with the patterns, for the message.
        places: Layers each place stands for.
        optional: Whether a pattern may name no layer.

    Raises:
        NoSuchLayer: A pattern names no layer.
        QexpError: A word with `@` is not a place.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith("@"):
            if pattern not in places:
                raise QexpError(f"{where}: {pattern!r} is not a place; use {' or '.join(places)}")
            hits = set(places[pattern]) & set(layers)
        else:
            hits = {name for name in layers if fnmatchcase(name, pattern)}
        if not hits and not optional:
            raise NoSuchLayer(
                f"{where}: the pattern {pattern!r} matches no layer{near(pattern, list(layers))}; "
                f"the model has {len(layers)} layers, such as {', '.join(layers[:4])}",
                pattern,
            )
        found |= hits
    return [name for name in layers if name in found]
