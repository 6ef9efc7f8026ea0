"""Makes objects from specifications: a mapping with `_target_` (a dotted name) and arguments, which may hold further specifications."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from qexp.errors import QexpError, near

TARGET, PARTIAL = "_target_", "_partial_"
HINTS = (TARGET, PARTIAL, "_convert_", "_recursive_")  # keys of a specification that are not arguments


def make(spec: Mapping[str, Any], *, where: str = "", as_partial: bool = False, **more: Any) -> Any:
    """Returns what a specification makes.

    Args:
        spec: `_target_` and arguments. `_partial_: true` returns a function that still takes arguments. Arguments that are
            specifications themselves are made first.
        where: The key that holds the specification, for errors: `schedule.optimizer`.
        as_partial: Return a function that still takes arguments, also without `_partial_` in the specification.
        **more: Arguments that replace those of the specification.

    Raises:
        QexpError: `_target_` is missing or cannot be imported, an argument is unknown, or a value is not allowed.

    >>> make({"_target_": "fractions.Fraction", "numerator": 1, "denominator": 4})
    Fraction(1, 4)
    """
    target = find(spec, where)
    arguments = {key: _made(value, f"{where}.{key}") for key, value in spec.items() if key not in HINTS}
    arguments |= more
    if as_partial or spec.get(PARTIAL):
        return partial(target, **arguments)
    _check_names(target, arguments, where)
    try:
        return target(**arguments)
    except QexpError:
        raise
    except Exception as error:
        raise QexpError(f"{_place(where)}{spec[TARGET]} raises {type(error).__name__}: {error}") from error


def find(spec: Mapping[str, Any], where: str = "") -> Callable[..., Any]:
    """Returns the class or function that a specification names.

    Raises:
        QexpError: The specification has no name, or the name cannot be imported.
    """
    if isinstance(spec, Mapping) and callable(spec.get(TARGET)):  # in a notebook or a test: the class itself
        return spec[TARGET]
    if not isinstance(spec, Mapping) or not isinstance(spec.get(TARGET), str):
        raise QexpError(
            f"{where or 'specification'}={spec!r} is not allowed; use a mapping with {TARGET}, such as "
            f"{{{TARGET}: package.module.Class}}"
        )
    return _located(spec[TARGET], where)


def _located(name: str, where: str) -> Callable[..., Any]:
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            found: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            # The module exists, but a module that it imports does not.
            if error.name and not f"{module_name}.".startswith(f"{error.name}."):
                raise QexpError(
                    f"{_place(where)}{TARGET}={name}: {module_name} cannot be imported ({error})"
                ) from error
            continue
        except Exception as error:
            raise QexpError(
                f"{_place(where)}{TARGET}={name}: importing {module_name} raises {type(error).__name__}: {error}"
            ) from error
        for part in parts[split:]:
            if not hasattr(found, part):
                raise QexpError(
                    f"{_place(where)}{TARGET}={name}: {module_name} has no {part!r}{near(part, _public(found))}"
                )
            found = getattr(found, part)
        if not callable(found):
            raise QexpError(f"{_place(where)}{TARGET}={name} is not a class or function")
        return found
    raise QexpError(
        f"{_place(where)}{TARGET}={name}: there is no module {parts[0]!r} on the Python path; install its package, or add its "
        "folder to PYTHONPATH"
    )


def _public(owner: Any) -> list[str]:
    """Returns the names in a module or class that do not begin with `_`."""
    return [name for name in vars(owner) if not name.startswith("_")] if hasattr(owner, "__dict__") else []


def _made(value: Any, where: str) -> Any:
    """Returns an argument with every specification in it made."""
    if isinstance(value, Mapping):
        if TARGET in value:
            return make(value, where=where)
        return {key: _made(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_made(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    return value


def _check_names(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Raises if an argument has no parameter; Python's own message names neither the key nor what is allowed."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise QexpError(
            f"{_place(where)}{target.__qualname__} takes no argument {unknown[0]!r}{near(unknown[0], list(parameters))}; allowed are "
            f"{', '.join(parameters)}"
        )


def _place(where: str) -> str:
    return f"{where}: " if where else ""
