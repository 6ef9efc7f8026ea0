"""Compiles the C++ and CUDA sources into libraries that work with every torch from 2.11 on and every Python.

A library is loaded from the package (a wheel may contain it) or from a cache folder. It is built there once per source text, processor
level and set of flags.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .toolkit import BuildError, nvcc_command

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
CARRIED = HERE / "compiled"
# The stable interface of the oldest torch that pyproject.toml allows.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No fast-math, no fused multiply-add: so that every implementation rounds each operation like the reference.
CPP_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
CUDA_FLAGS = ("-O3", "-std=c++20", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-Xcompiler=-fPIC")
# Compute capabilities of the CUDA library for a wheel. Machine code also runs on later devices of its generation (8.0 on 8.6 and 8.9);
# newer generations compile the last one's intermediate code when they load it.
CAPABILITIES = ("75", "80", "90", "100", "120")
LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3", "DEFAULT": "x86-64-v2"}
SECONDS = {"cpp": 3.2, "cuda": 12.0}  # to compile one source on one core of 2020


def cache_folder() -> Path:
    """Returns where compiled libraries are kept: `QEXP_CACHE_DIR`, else `qexp` under the user's cache folder."""
    if folder := os.environ.get("QEXP_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexp"


def sources(kind: str) -> list[Path]:
    """Returns the source files of `cpp` or `cuda`."""
    return sorted(HERE.glob("*/*.cpp" if kind == "cpp" else "*/*.cu"))


def level() -> str:
    """Returns the processor's level in compilers' words; on machines other than x86-64, the name of the machine."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    return LEVELS.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2")


def flags(kind: str, level: str) -> list[str]:
    """Returns the flags of the compiler. The level changes the speed of the CPU library, but no bit of its results."""
    if kind == "cuda":
        return [TARGET, "-DUSE_CUDA", *CUDA_FLAGS]
    return [TARGET, *CPP_FLAGS, *([f"-march={level}"] if level.startswith("x86-64-") else [])]


def architectures() -> list[str]:
    """Returns the compute capabilities to compile CUDA code for, without dots: `TORCH_CUDA_ARCH_LIST`, else this machine's."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        found = re.findall(r"(\d+)\.(\d+)", named)
    elif torch.cuda.is_available():
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    else:
        raise BuildError("no CUDA device")
    return sorted({f"{major}{minor}" for major, minor in found}, key=int)


def architecture_flags(names: list[str]) -> list[str]:
    """Returns nvcc's flags: machine code for each capability, and intermediate code of the last for newer devices."""
    ahead = [f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"] if names else []
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names] + ahead


def serves(built: Iterable[str], wanted: Iterable[str]) -> bool:
    """Returns whether code for the capabilities `built` runs on every wanted one, as machine code or as intermediate code."""
    built = sorted(built, key=int)
    return bool(built) and all(
        int(device) > int(built[-1]) or any(b[:-1] == device[:-1] and int(b) <= int(device) for b in built)
        for device in wanted
    )


def library_name(kind: str, level: str, capabilities: Iterable[str] | None = None) -> str:
    """Returns the file name of a library; it includes the conditions under which the library is valid."""
    digest = hashlib.sha256("\0".join([sys.platform, *flags(kind, level)]).encode())
    headers = [*HERE.glob("*/*.h"), *(HERE.glob("*/*.cuh") if kind == "cuda" else ())]
    for path in sorted({*sources(kind), *headers}):
        digest.update(f"{path.parent.name}/{path.name}".encode())
        digest.update(path.read_bytes())
    if kind == "cuda":
        names = architectures() if capabilities is None else capabilities
        level = f"{str(torch.version.cuda).partition('.')[0]}-{'-'.join(names)}"
    return f"{kind}-{level}-{digest.hexdigest()[:20]}.so"


def _carried(kind: str, name: str) -> Path:
    """Returns the package's library of that name; a CUDA library may be for more capabilities than this machine has."""
    if kind == "cpp":
        return CARRIED / name
    start, end = "-".join(name.split("-")[:2]), name.rpartition("-")[2]
    found = [path for path in CARRIED.glob(f"{start}-*-{end}") if serves(path.name.split("-")[2:-1], architectures())]
    return min(found, default=CARRIED / name)


def load(kind: str, *, build: bool) -> str:
    """Loads the library `cpp` or `cuda`, and builds it if package and cache lack it; returns where it came from.

    Raises:
        BuildError: The library is neither found nor built.
    """
    at = level()
    name = library_name(kind, at)
    target = cache_folder() / name
    for found in (_carried(kind, name), target):
        if _open(found):
            return f"found in {found.parent}"
    if not build:
        raise BuildError("not built yet")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_suffix(".lock").open("w")
    except OSError as error:
        raise BuildError(f"the cache folder cannot be written ({error}); set QEXP_CACHE_DIR") from error
    with lock, _held(lock):
        if _open(target):
            return f"found in {target.parent}"
        compile_library(kind, target, at, architectures() if kind == "cuda" else ())
        torch.ops.load_library(target)
    return f"built into {target.parent}"


def _open(target: Path) -> bool:
    """Loads a library; returns False if it is missing or damaged (a build then replaces it)."""
    if not target.exists():
        return False
    try:
        torch.ops.load_library(target)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _held(lock) -> Iterator[None]:
    """Holds the lock, which the system releases if this process dies; without locks, the rename alone protects the file."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks: two processes may then build the same library, but each renames a whole one
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def compile_library(kind: str, target: Path, level: str, capabilities: Iterable[str] = ()) -> None:
    """Builds in a temporary folder and renames the finished library, so that no process sees a partial one.

    Args:
        kind: `cpp` or `cuda`.
        target: The library's file.
        level: The processor's level, for `cpp`.
        capabilities: Compute capabilities without dots, for `cuda`.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found")
    include = Path(torch.__file__).parent / "include"
    command = [compiler, f"-isystem{include}"] if kind == "cpp" else [*nvcc_command(), f"-isystem={include}"]
    command += [*flags(kind, level), *(architecture_flags(list(capabilities)) if kind == "cuda" else ())]
    for left in target.parent.glob(f".{target.stem}-*"):  # left by a build of this library that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.stem}-", dir=target.parent))
    units = sorted(
        sources(kind), key=lambda unit: unit.stat().st_size, reverse=True
    )  # the longest first: no core waits
    jobs = min(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))), len(units))
    log.info("kernels: building them, about %.0f s, once", max(SECONDS[kind] * len(units) / jobs, 1))
    try:
        objects = _compile_units(units, lambda unit, to: [*command, "-c", str(unit), "-o", str(to)], scratch, jobs)
        library = Path(torch.__file__).parent / "lib"
        # libtorch loads its own libraries, including the CUDA runtime, and the kernels use the same ones.
        link = ["-shared", "-Wl,--no-as-needed", f"-L{library}", "-ltorch", "-ltorch_cpu"]
        if sys.platform == "darwin":
            link = ["-dynamiclib", "-undefined", "dynamic_lookup"]
        _run([compiler, *map(str, objects), *link, *_sanitizers(command), "-o", str(scratch / target.name)])
        (scratch / target.name).replace(target)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"the {kind} sources did not compile: {_first_error(str(error))}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compile_units(
    units: list[Path], command: Callable[[Path, Path], list[str]], scratch: Path, jobs: int
) -> list[Path]:
    """Compiles the sources side by side; objects are named after folders, since all sources are called `op`."""
    objects = [scratch / f"{unit.parent.name}_{unit.stem}.o" for unit in units]
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda pair: _run(command(*pair)), zip(units, objects, strict=True)):
            pass
    return objects


def _sanitizers(command: list[str]) -> list[str]:
    return [flag for flag in command if flag.startswith("-fsanitize")]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)


def _first_error(output: str) -> str:
    """Returns the line of a compiler's output that holds the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), "".join(lines[:1]))
