"""Separates callbacks that only observe from others, which change names of points and are left out of `pretrain`."""

from __future__ import annotations

from collections.abc import Mapping
from pydoc import ErrorDuringImport, locate
from typing import Any


def others(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configurations of callbacks, without those of classes that state `observes = True` themselves.

    Such a class changes neither weights nor scores nor the length of a training. The statement is not inherited: a subclass may override
    a hook, so it has to state `observes` again.
    """
    return {name: node for name, node in callbacks.items() if node and not _observes(node)}


def _observes(node: Mapping[str, Any]) -> bool:
    try:
        return bool(vars(locate(str(node.get("_target_")))).get("observes", False))
    except (ErrorDuringImport, TypeError, AttributeError):  # the run raises an error for it later
        return False
