"""qexp: how few bits can this CNN live on, with which method, at what cost?

Importing `qexp` stays light: neither Lightning nor torchvision is loaded until something needs it.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Returns a part of the front door, imported when it is first used.

    `load(run_folder)` returns the quantized network of a finished run, as it was evaluated; `load("zoo:NAME")` that of the zoo.
    """
    if name == "load":
        from qexp.run.saved_network import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
