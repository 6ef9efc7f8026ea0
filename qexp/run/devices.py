"""Where a point runs: on which device, and in how many processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import seed_everything
from torch import nn

from qexp.callbacks.kernels import load_kernels
from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.run.settings import Settings, TrainerOptions
from qexp.system import ranks

_threads_before: list[int] = []  # the process's own, while a point's are set


def device_name(trainer: TrainerOptions) -> str:
    """Returns the name of the accelerator the trainer uses, or `cpu`."""
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else "cpu"


def device(trainer: TrainerOptions) -> torch.device:
    """Returns the device that calibration and passes run on."""
    return torch.device("cpu" if device_name(trainer) == "cpu" else "cuda")


def set_products(trainer: TrainerOptions) -> None:
    """Selects how a GPU multiplies float32 numbers: as float32, or with factors rounded to TF32 (trainer.tf32=true).

    PyTorch's own default is TF32 in convolutions. Dequantized values (code times scale) do not fit into TF32, so that sums near a tie
    would get other codes than on a CPU.
    """
    torch.backends.cudnn.allow_tf32 = trainer.tf32
    torch.backends.cuda.matmul.allow_tf32 = trainer.tf32


def share_machine(trainer: TrainerOptions) -> None:
    """Sets the threads of this process and how far it stands back behind other work; no priority is ever raised again."""
    if trainer.threads:
        _threads_before.append(torch.get_num_threads())
        torch.set_num_threads(trainer.threads)
    elif _threads_before:  # an earlier point of the sweep has changed them
        torch.set_num_threads(_threads_before[0])
        _threads_before.clear()
    for thread in Path("/proc/self/task").glob("*") if trainer.nice else ():
        with suppress(OSError):  # it has ended
            number = int(thread.name)
            os.setpriority(os.PRIO_PROCESS, number, max(os.getpriority(os.PRIO_PROCESS, number), trainer.nice))


def lay_out_images(data: DataSet, trainer: TrainerOptions) -> None:
    """Puts the channels of images innermost in memory or outermost, as the settings or the device ask for."""
    if trainer.channels_last is not None:
        data.channels_last = trainer.channels_last
    elif device_name(trainer) != "cpu":  # on a CPU the data set's own option decides
        data.channels_last = True


def lay_out_weights(model: nn.Module, trainer: TrainerOptions) -> None:
    """Puts the channels of weights innermost in memory, in place, as the settings or the device ask for."""
    if trainer.channels_last or (trainer.channels_last is None and device_name(trainer) != "cpu"):
        model.to(memory_format=torch.channels_last)


def processes(trainer: TrainerOptions) -> int:
    """Returns the number of processes on this machine that the trainer's options name; `auto` is one.

    Raises:
        QexpError: The options name more than one machine, or more processes than there are GPUs.
    """
    asked, nodes = trainer.devices, trainer.num_nodes
    if nodes != 1:
        raise QexpError(
            f"trainer.num_nodes={nodes} is not allowed: a point runs on the devices of one machine; spread the points of a sweep over "
            "machines instead (hydra/launcher=ray or submitit_slurm)"
        )
    count = 1 if asked == "auto" else asked
    most = torch.cuda.device_count() if device_name(trainer) != "cpu" else None
    if not isinstance(count, int) or count < 1 or (most is not None and count > most):
        has = "" if most is None else f", at most {most}, the GPUs of this machine"
        raise QexpError(f"trainer.devices={asked} is not allowed; use auto (one) or a whole number from 1{has}")
    return count


def spread(settings: Settings, function: Callable[..., Any], data: DataSet, *args: Any) -> Any:
    """Returns the result of `function(data, *args)`, run by the trainer's number of processes with seed and kernels set."""
    trainer = settings.trainer
    count, gpu, cores = processes(trainer), device_name(trainer) != "cpu", torch.get_num_threads()

    def prepare() -> None:
        if not gpu:
            torch.set_num_threads(max(1, cores // count))  # the cores are shared out
        load_kernels(settings.kernels)
        set_products(trainer)
        seed_everything(settings.seed, workers=True, verbose=False)

    data.trainer = None  # left by an earlier phase; it would be pickled with the data
    return ranks.spread(function, count, data, *args, gpu=gpu, prepare=prepare)
