"""Fair timing of small functions against each other."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Measure(NamedTuple):
    """A function to time against a baseline, and the ratio to reach."""

    name: str
    run: Callable[[], object]
    baseline_name: str
    baseline: Callable[[], object]
    goal: float | None = None


class Figure(NamedTuple):
    """The medians of one measure, in milliseconds, and their ratio."""

    name: str
    baseline_name: str
    milliseconds: float
    baseline_milliseconds: float
    ratio: float
    goal: float | None


def figure(measure: Measure, device: torch.device, rounds: int = 15) -> Figure:
    """Returns the median times of both, which run in turn in one process, so that the machine's state is the same for both."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for f, kept in zip((measure.run, measure.baseline), times, strict=True):
            seconds = _seconds(f, device)
            if number >= 2:
                kept.append(seconds * 1e3)
    one, two = (statistics.median(t) for t in times)
    return Figure(measure.name, measure.baseline_name, one, two, one / two, measure.goal)


def _seconds(f: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin
