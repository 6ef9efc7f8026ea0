"""Selects the implementation: compiled for CUDA, compiled for the CPU, or the PyTorch reference."""

import threading
import warnings
from typing import NamedTuple

import torch

from . import build as builder
from .errors import KernelError
from .library import LIBRARY, REFERENCES

IMPLEMENTATIONS = ("auto", "cuda", "cpp", "reference")


class Loaded(NamedTuple):
    """The implementation in use (`cuda`, `cpp` or `reference`), and the reason."""

    implementation: str
    reason: str


_lock = threading.Lock()
_had: dict[str, str | builder.BuildError] = {}  # library -> where it came from, or why it is missing
_overrides: list[torch.library.Library] = []  # the references that take precedence over compiled kernels


def load(which: str = "auto", *, build: bool = True) -> Loaded:
    """Loads an implementation, after building it if necessary, and returns it; a second call costs nothing.

    `auto` takes the fastest available one, or falls back and records the reason; it never fails. `cuda` includes the
    C++ kernels for tensors on the CPU.

    Args:
        which: `auto`, `cuda`, `cpp` or `reference`.
        build: Compile libraries that the cache lacks; False uses only libraries that are already built.

    Raises:
        KernelError: `cuda` or `cpp` was named and is not available.
    """
    if which not in IMPLEMENTATIONS:
        raise KernelError(f"kernels: got {which!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    with _lock:
        if which == "reference":
            _use_references(True)
            return Loaded("reference", "asked for")
        answer = _cuda(which, build) if which == "cuda" or (which == "auto" and torch.cuda.is_available()) else None
        answer = answer or _cpp(which, build)
        _use_references(answer.implementation == "reference")
        return answer


def compiled(name: str) -> bool:
    """Returns whether an operator computes tensors on the CPU with compiled code now, not with the reference."""
    return not _overrides and torch._C._dispatch_has_kernel_for_dispatch_key(f"{LIBRARY.ns}::{name}", "CPU")


def _cuda(which: str, build: bool) -> Loaded | None:
    if not torch.cuda.is_available():
        raise KernelError("kernels: 'cuda' is not available: torch sees no CUDA device; use auto, cpp or reference")
    try:
        how = _library("cuda", build)
    except builder.BuildError as error:
        if which == "cuda":
            raise KernelError(f"kernels: 'cuda' is not available: {error}") from error
        return None
    try:
        return Loaded("cuda", f"{how}; on the CPU: {_library('cpp', build)}")
    except builder.BuildError as error:
        return Loaded("cuda", f"{how}; on the CPU: the reference ({error})")


def _cpp(which: str, build: bool) -> Loaded:
    try:
        how = _library("cpp", build)
    except builder.BuildError as error:
        if which == "cpp":
            raise KernelError(f"kernels: 'cpp' is not available: {error}") from error
        return Loaded("reference", str(error))
    failed = _had.get("cuda")
    return Loaded("cpp", f"{how}; not cuda: {failed}" if isinstance(failed, builder.BuildError) else how)


def _library(kind: str, build: bool) -> str:
    """Returns where a library came from; after a failure it is not tried again."""
    if kind not in _had:
        try:
            _had[kind] = builder.load(kind, build=build)
        except builder.BuildError as error:
            if build:
                _had[kind] = error
            raise
    if isinstance(_had[kind], builder.BuildError):
        raise _had[kind]
    return _had[kind]


def _use_references(wanted: bool) -> None:
    """Lets the references take precedence over compiled kernels, or removes them."""
    if wanted == bool(_overrides):
        return
    if not wanted:
        _overrides.clear()  # a library's registrations end when it is dropped
        return
    library = torch.library.Library(LIBRARY.ns, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in REFERENCES.items():
            for key in ("CPU", "CUDA"):
                library.impl(name, function, key)
    _overrides.append(library)
