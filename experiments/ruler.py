"""Times things against each other so that none disturbs another: interleaved in random order, and each once alone.

A figure of one process can be wrong: threads of a library that wait actively for their next work take the processor from whatever is
timed beside them. So each thing is also timed alone in a process of its own, and the table shows how far the two are apart. Processor
time shows that even on a busy machine: it counts every thread of the process, and nothing of other processes.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WARM = 2  # rounds that are not counted
APART = 1.3  # beyond it, the time beside others is not the time alone


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, bases: tuple[str, ...], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Returns, for each step, its median milliseconds, its mean processor time, and its ratio to each base; the first rounds do not count.

    Every round runs all steps, in an order drawn anew; a ratio is the median of the ratios within a round, which a busy machine moves
    least.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(seed)
    for i in range(rounds + WARM):
        draw.shuffle(order)
        for name in order:
            start, used = time.perf_counter(), time.process_time()
            steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= WARM:
                times[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - used)
    return {
        name: {"ms": 1000 * statistics.median(taken), "processor_ms": 1000 * statistics.mean(busy[name])}
        | {base: statistics.median(t / b for t, b in zip(taken, times[base])) for base in bases}
        for name, taken in times.items()
    }


def alone(module: str, *arguments: str) -> dict[str, float]:
    """Returns the figures of one step that `python -m MODULE ARGUMENTS` times in a process of its own and prints as its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def apart(beside: Mapping[str, float], by_itself: Mapping[str, float]) -> float:
    """Returns how many times the processor time of a step alone it takes beside others."""
    return beside["processor_ms"] / by_itself["processor_ms"]
