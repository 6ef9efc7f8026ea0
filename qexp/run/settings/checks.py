"""Checks of single values: each returns the value, or raises an error with its key, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qexp.errors import QexpError, near
from qexp.system.objects import TARGET

Spec = Mapping[str, Any]  # `_target_` and arguments


def none_or(check: Any, value: Any, key: str, *bounds: Any, **more: Any) -> Any:
    """Returns None for None, else what the check returns."""
    return None if value is None else check(value, key, *bounds, **more)


def refusal(key: str, value: Any, allowed: str) -> QexpError:
    """Returns the error for a value that is not allowed."""
    shown = "null" if value is None else value
    return QexpError(f"{key}={shown} is not allowed; use {allowed}")


def whole(value: Any, key: str, least: int | None = None, most: int | None = None) -> int:
    """Returns a whole number within bounds; 3.0 counts as 3."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or (least is not None and value < least) or (most is not None and value > most):
        bounds = (
            f" from {least}"
            if most is None and least is not None
            else f" from {least} to {most}"
            if most is not None
            else ""
        )
        raise refusal(key, value, f"a whole number{bounds}")
    return value


def number(
    value: Any, key: str, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> float:
    """Returns a finite number within bounds."""
    words = [f"at least {least:g}" if least is not None else "", f"above {above:g}" if above is not None else ""]
    words += [f"below {below:g}" if below is not None else ""]
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not fits
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise refusal(key, value, " ".join(["a number", " and ".join(filter(None, words))]).strip())
    return float(value)


def limit(value: Any, key: str) -> float | int:
    """Returns a limit on batches in Lightning's form: a count or a share."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_share = isinstance(value, float) and 0 < value <= 1
    if not is_count and not is_share:
        raise refusal(key, value, "a number of batches from 1, a share above 0.0 and up to 1.0, or null for all")
    return value


def truth(value: Any, key: str) -> bool:
    """Returns a truth value."""
    if not isinstance(value, bool):
        raise refusal(key, value, "true or false")
    return value


def text(value: Any, key: str) -> str:
    """Returns a non-empty text; a number becomes its digits."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise refusal(key, value, "a text")
    return value


def choice(value: Any, key: str, allowed: Sequence[str]) -> str:
    """Returns one of the allowed words."""
    if value not in allowed:
        shown = value if value is None else f"{value}{near(str(value), list(allowed))}"
        raise refusal(key, shown, " or ".join([", ".join(allowed[:-1]), allowed[-1]]))
    return value


def listed(value: Any, key: str) -> list[Any]:
    """Returns a list."""
    if not isinstance(value, list | tuple):
        raise refusal(key, value, "a list")
    return list(value)


def mapping(value: Any, key: str) -> Mapping[str, Any]:
    """Returns a mapping."""
    if not isinstance(value, Mapping):
        raise refusal(key, value, f"a mapping, or choose a file of conf/{key.split('.')[0]}")
    return value


def specification(value: Any, key: str) -> Spec:
    """Returns a specification: a mapping with `_target_`."""
    value = mapping(value, key)
    if not isinstance(value.get(TARGET), str):
        raise QexpError(
            f"{key} has no {TARGET}; name the class or function that makes it: {key}.{TARGET}=package.module.Name"
        )
    return value
