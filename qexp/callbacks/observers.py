"""Which callbacks only look on: the others belong in the names of what is kept, and stay out of a float training nobody asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pydoc import ErrorDuringImport, locate
from typing import Any


def others(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configurations of callbacks, without those of classes that state `observes = True` themselves.

    Such a class changes neither weights nor scores, and leaves training as long as it is. A class that inherits the statement has not
    made it: whoever overrides a hook states it again.
    """
    return {name: node for name, node in callbacks.items() if node and not _observes(node)}


def _observes(node: Mapping[str, Any]) -> bool:
    try:
        return bool(vars(locate(str(node.get("_target_")))).get("observes", False))
    except (ErrorDuringImport, TypeError, AttributeError):  # the run names what is wrong with it
        return False
