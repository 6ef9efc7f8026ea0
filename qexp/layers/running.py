"""The torch-function modes of modules that pass function calls to stand-ins (`qexp.layers.calls`), while these modules run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class Running(threading.local):
    """The modes of a thread, outermost first.

    Attributes:
        reading: Whether the network is being recorded: calls that differ from those of an earlier recording are then no error.
    """

    def __init__(self) -> None:
        self.modes: list[TorchFunctionMode] = []
        self.reading = False


RUNNING = Running()


@contextmanager
def left() -> Iterator[None]:
    """Context manager: leaves the modes that are on top of torch's stack, so that a layer's own functions do not pass through them."""
    taken = []
    for mode in reversed(RUNNING.modes):
        top = torch._C._len_torch_function_stack() - 1
        if top >= 0 and torch._C._get_function_stack_at(top) is mode:
            taken.append(torch._C._pop_torch_function_stack())
    try:
        yield
    finally:
        for mode in reversed(taken):
            torch._C._push_on_torch_function_stack(mode)


@contextmanager
def reading() -> Iterator[None]:
    """Context manager: the network runs to be recorded, so calls without a stand-in of their form run as they are."""
    before, RUNNING.reading = RUNNING.reading, True
    try:
        yield
    finally:
        RUNNING.reading = before
