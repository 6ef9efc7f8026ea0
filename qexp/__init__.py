"""qexp: how few bits can this CNN live on, with which method, at what cost?

The front door has four verbs: `qexp.quantize(model, images, ...)`, `qexp.load(run_folder)`, `qexp.verify(model, images)` and
`qexp.export(model, form, path)`; `qexp.Recipe` describes a method of one's own. Importing `qexp` stays light: neither Lightning nor
torchvision is loaded until something needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexp.recipe import Recipe
    from qexp.run.saved_network import load
    from qexp.verbs.export import export
    from qexp.verbs.quantize import quantize
    from qexp.verbs.verify import verify

__version__ = "0.1.0"
__all__ = ["Recipe", "export", "load", "quantize", "verify"]
_HOMES = {
    "Recipe": "qexp.recipe",
    "export": "qexp.verbs.export",
    "load": "qexp.run.saved_network",
    "quantize": "qexp.verbs.quantize",
    "verify": "qexp.verbs.verify",
}


def __getattr__(name: str) -> Any:
    """Returns a part of the front door, imported when it is first used."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
