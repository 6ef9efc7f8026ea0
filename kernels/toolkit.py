"""Finds nvcc: in `CUDA_HOME`, on the path, in NVIDIA's default folder, or beside torch, where pip installs it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch


class BuildError(Exception):
    """Raised if a compiled library is not available; the message is the reason."""


def nvcc_command() -> list[str]:
    """Returns the command of nvcc; only the compiler is needed, since the kernels run on torch's own CUDA runtime.

    Raises:
        BuildError: There is no nvcc, or its major version differs from that of torch's CUDA.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside_torch = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("cu[0-9]*/bin/nvcc"))
    places = [named and Path(named) / "bin" / "nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *beside_torch]
    for place in places:
        if place and Path(place).exists():
            _same_major(str(place))
            return [str(place)]
    raise BuildError(
        "no CUDA compiler (nvcc) was found; set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,cccl,cudart]'"
    )


def version(nvcc: str) -> str:
    """Returns nvcc's version, such as 13.0."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""


def known_capabilities() -> list[str]:
    """Returns the compute capabilities that nvcc compiles for, without dots.

    Raises:
        BuildError: There is no nvcc, or its major version differs from that of torch's CUDA.
    """
    listed = subprocess.run([*nvcc_command(), "--list-gpu-arch"], capture_output=True, text=True).stdout
    return re.findall(r"compute_(\d+)", listed)


def _same_major(nvcc: str) -> None:
    wanted, found = torch.version.cuda, version(nvcc)
    if wanted and found and wanted.partition(".")[0] != found.partition(".")[0]:
        raise BuildError(
            f"{nvcc} is of CUDA {found}, but torch runs on CUDA {wanted}; set CUDA_HOME to one of {wanted}"
        )
