"""Several processes of this machine that work as one: each has a rank, and they exchange tensors through `torch.distributed`.

A function runs on several processes only during its call; the code around it stays in one process. So a run on several devices is an
ordinary run in which collecting statistics, training and evaluation each use several processes.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle  # hooks and closures travel too
import torch
from torch import distributed
from tqdm import tqdm

_PATIENCE = timedelta(hours=24)  # rank 0 may validate, write or wait for a lock while the others are done


def world() -> int:
    """Returns the number of processes that work together; 1 outside `spread`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Returns this process's number among them, 0 for the first or only one."""
    return distributed.get_rank() if world() > 1 else 0


def share(items: Sequence[Any]) -> Sequence[Any]:
    """Returns this rank's part of a sequence: neighbours stay together, so that the parts in rank order are the sequence."""
    n = len(items)
    return items[n * rank() // world() : n * (rank() + 1) // world()]


def gathered(value: Any) -> list[Any]:
    """Returns the values of all ranks, in their order."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def mean(x: torch.Tensor) -> torch.Tensor:
    """Returns the mean of the ranks' tensors of one shape; the tensor itself in a single process."""
    if world() == 1:
        return x
    total = x.clone()
    distributed.all_reduce(total)
    return total / world()


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Returns all samples' columns `[k, n]` from each rank's `[k, n_rank]`, where rank r of w has samples r, r + w, r + 2w, ..."""
    parts = gathered(rows)
    out = torch.cat(parts, 1)
    places = [torch.arange(r, out.shape[1], len(parts)) for r in range(len(parts))]
    # Uneven counts mean limited batches; their order is unknown.
    if [len(p) for p in places] == [part.shape[1] for part in parts]:
        out = out[:, torch.argsort(torch.cat(places))]
    return out


def spread(
    function: Callable[..., Any], processes: int, *args: Any, gpu: bool = False, prepare: Callable | None = None
) -> Any:
    """Runs `function(*args)` in several processes at once and returns the result of rank 0.

    The processes stay for the next call until this process ends; if one of them fails, all end.

    Args:
        function: Function that every process runs; it may use `share`, `gathered` and `torch.distributed`.
        processes: Number of processes.
        args: Its arguments, copied into every process.
        gpu: Rank r computes on GPU r and exchanges by NCCL; otherwise on the CPU, by Gloo.
        prepare: Function called first in every process.

    Raises:
        Exception: The exception that the function raised in one of them.
    """
    team = _teams.get((processes, gpu))
    if team is None:
        dismiss()
        team = _teams[processes, gpu] = _Team(processes, gpu)
    try:
        return team.run((function, args, prepare))
    except BaseException:  # ranks wait for each other: those that did not fail are blocked
        dismiss()
        raise


def dismiss() -> None:
    """Ends the processes that wait for work."""
    for team in _teams.values():
        team.end()
    _teams.clear()


class _Team:
    """Processes that run one function after another together."""

    def __init__(self, processes: int, gpu: bool) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="qexp-ranks-")
        context = torch.multiprocessing.get_context("spawn")
        self.workers, self.pipes = [], []
        for number in range(processes):
            ours, theirs = context.Pipe()
            args = (number, processes, self.folder.name, gpu, sys.path, theirs)
            worker = context.Process(target=_work, args=args, daemon=True)
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(ours)

    def run(self, job: tuple[Any, ...]) -> Any:
        """Returns rank 0's result; raises the first error."""
        (Path(self.folder.name) / "job").write_bytes(cloudpickle.dumps(job))
        for pipe in self.pipes:
            pipe.send(True)
        result, waiting = None, list(self.pipes)
        while waiting:
            for pipe in wait(waiting):
                waiting.remove(pipe)
                try:
                    succeeded, answer = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"process {self.pipes.index(pipe)} of {len(self.pipes)} was killed") from None
                if not succeeded:
                    raise cloudpickle.loads(answer)
                result = cloudpickle.loads(answer) if answer else result
        return result

    def end(self) -> None:
        """Kills the processes; their joint results are lost."""
        for worker, pipe in zip(self.workers, self.pipes):
            pipe.close()
            worker.kill()
            worker.join()
        self.folder.cleanup()


_teams: dict[tuple[int, bool], _Team] = {}
atexit.register(dismiss)


def _work(number: int, processes: int, folder: str, gpu: bool, path: list[str], pipe: Connection) -> None:
    sys.path[:] = path
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own lock is a semaphore between processes, which a killed process leaves behind
    logging.basicConfig(level=logging.INFO if number == 0 else logging.ERROR, format="%(message)s", stream=sys.stdout)
    with suppress(OSError, AttributeError):  # Linux: without this, a process would continue after its parent was killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": str(processes)}
    try:
        if gpu:
            torch.cuda.set_device(number)
        store = distributed.FileStore(str(Path(folder) / "store"), processes)
        backend = "nccl" if gpu else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=_PATIENCE)
        while pipe.recv():
            function, args, prepare = cloudpickle.loads((Path(folder) / "job").read_bytes())
            if prepare is not None:
                prepare()
            result = function(*args)
            pipe.send((True, b"" if number else cloudpickle.dumps(result)))
            del function, args, prepare, result
    except EOFError:  # the parent process has closed the pipe
        return
    except BaseException as error:
        pipe.send((False, cloudpickle.dumps(error)))
