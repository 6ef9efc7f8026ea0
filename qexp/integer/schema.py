"""Schemas of JSON documents; a document is checked as a whole before it is used.

A schema is a type (`str`), a `Whole` number within limits, a list `[schema]` of any length, a mapping `{key: schema}` whose keys must all
be there (others may be), `Either` of several, or `ANY`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.errors import QexpError

ANY = object()
LARGEST = 1 << 26  # bytes of a JSON document
LARGE = 1e300  # no number of a program is beyond


@dataclass(frozen=True)
class Whole:
    """A whole number within limits; True does not count as one."""

    low: int = 0
    high: int = 2**31 - 1


@dataclass(frozen=True)
class Either:
    """One of several schemas."""

    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Exactly:
    """A list of a fixed number of items of one schema."""

    count: int
    of: Any


@dataclass(frozen=True)
class Mapped:
    """A mapping of any keys to values of one schema."""

    of: Any


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        QexpError: The file cannot be read, is not JSON, or is nested too deeply.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise QexpError(f"{path}: {path.stat().st_size:,} bytes; {LARGEST:,} are allowed")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise QexpError(f"{path}: cannot be read ({_short(error)})") from error


def check(value: Any, schema: Any, where: str) -> None:
    """Checks a value against a schema.

    Raises:
        QexpError: The value differs. The message names the place, the value and what is allowed.
    """
    wanted = _differs(value, schema)
    if wanted:
        raise QexpError(f"{where} is {_shown(value)}; {wanted} is allowed")
    if isinstance(schema, Either):
        schema = next(choice for choice in schema.choices if _fits(value, choice))
    if isinstance(schema, dict):
        for key, inner in schema.items():
            if key not in value:
                raise QexpError(f"{where} lacks {key!r}")
            check(value[key], inner, f"{where}: {key}")
    elif isinstance(schema, Mapped):
        for key, inner in value.items():
            check(inner, schema.of, f"{where}: {key}")
    elif isinstance(schema, list | Exactly):
        for i, inner in enumerate(value):
            check(inner, schema[0] if isinstance(schema, list) else schema.of, f"{where}[{i}]")


def _fits(value: Any, schema: Any) -> bool:
    try:
        check(value, schema, "")
    except QexpError:
        return False
    return True


def _differs(value: Any, schema: Any) -> str | None:
    """Returns what would be allowed, if the value itself (not its content) differs."""
    if schema is ANY:
        return None
    if schema is None:
        return None if value is None else "null"
    if isinstance(schema, Whole):
        is_whole = isinstance(value, int) and not isinstance(value, bool) and schema.low <= value <= schema.high
        return None if is_whole else f"a whole number {schema.low} .. {schema.high}"
    if isinstance(schema, Either):
        wanted = [_differs(value, choice) or "another content" for choice in schema.choices]
        return None if any(_fits(value, choice) for choice in schema.choices) else " or ".join(wanted)
    if isinstance(schema, Exactly):
        is_such = isinstance(value, list) and len(value) == schema.count
        return None if is_such else f"a list of {schema.count}"
    if isinstance(schema, list):
        return None if isinstance(value, list) else "a list"
    if isinstance(schema, dict | Mapped):
        return None if isinstance(value, dict) else "a mapping"
    is_number = (
        schema is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGE
    )
    names = {str: "text", bool: "true or false", float: "a finite number"}
    is_such = is_number if schema is float else isinstance(value, schema)
    return None if is_such else names.get(schema, schema.__name__)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'a mapping' if isinstance(value, dict) else 'a list'} of {len(value)}"
    try:
        return repr(value)[:60]
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"


def _short(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
