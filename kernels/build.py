"""Compiles the C++ and CUDA sources into a cache folder, once per torch version, processor, flags and source text."""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
# No fast-math, no fused multiply-add: every implementation rounds each operation as the reference does.
CPP_FLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
CUDA_FLAGS = ("-O3", "-std=c++20", "-fmad=false", "-prec-div=true", "-ftz=false", "--expt-relaxed-constexpr")


class BuildError(Exception):
    """A compiled library cannot be had; the message is the reason."""


def cache_folder() -> Path:
    """Returns where compiled libraries are kept: `QEXP_CACHE_DIR`, else `qexp` under the user's cache folder."""
    if folder := os.environ.get("QEXP_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexp"


def sources(kind: str) -> list[Path]:
    """Returns what is compiled for `cpp` or `cuda`."""
    return sorted(HERE.glob("*/*.cpp" if kind == "cpp" else "*/*.cu"))


def flags(kind: str) -> list[str]:
    """Returns the flags of the compiler; those of the CPU library fit this processor only."""
    if kind == "cuda":
        return list(CUDA_FLAGS)
    native = ["-march=native"] if platform.machine() in ("x86_64", "AMD64", "aarch64") else []
    return [*CPP_FLAGS, *native, *([] if sys.platform == "darwin" else ["-fopenmp"])]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _architectures() -> str:
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return named
    if torch.cuda.is_available():
        return ";".join(
            sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
        )
    raise BuildError("no CUDA device")


def stamp(kind: str) -> str:
    """Returns what a compiled library is valid for, as a short hash."""
    text = [torch.__version__, str(torch.version.cuda), platform.machine(), *flags(kind)]
    text.append(_processor() if kind == "cpp" else _architectures())
    digest = hashlib.sha256("\0".join(text).encode())
    for path in sorted({*sources(kind), *HERE.glob("*/*.h")}):
        digest.update(f"{path.parent.name}/{path.name}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def load(kind: str, *, build: bool) -> str:
    """Loads the library `cpp` or `cuda`, built first where the cache lacks it; returns how it was had.

    Raises:
        BuildError: It cannot be had.
    """
    target = cache_folder() / f"{kind}-{stamp(kind)}.so"
    if _open(target):
        return f"found in {target.parent}"
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
        _compile(kind, target)
    return f"built into {target.parent}"


def _open(target: Path) -> bool:
    """Loads a library; False where there is none, or one that is damaged (a build then replaces it)."""
    if not target.exists():
        return False
    try:
        torch.ops.load_library(target)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _held(lock) -> Iterator[None]:
    """Holds the lock, which the system releases if this process dies; where there are none the rename alone must do."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks: two processes may then build the same, never half of it
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def _compile(kind: str, target: Path) -> None:
    """Builds in a folder of its own and moves the finished library into place, so that nobody sees half of one."""
    log = logging.getLogger("torch.utils.cpp_extension")
    log.setLevel(logging.ERROR)  # it remarks on a missing CUDA device, which is no news here
    from torch.utils import cpp_extension

    if kind == "cuda" and cpp_extension.CUDA_HOME is None:
        raise BuildError("no CUDA toolkit (nvcc) was found; set CUDA_HOME")
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found")
    for left in target.parent.glob(f".{target.stem}-*"):  # by a build of this library that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.stem}-", dir=target.parent))
    # A `ninja` installed beside the interpreter is only on the path of an activated environment.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            cpp_extension.load(
                name=f"qexp_{kind}",
                sources=_translation_units(kind, scratch),
                extra_cflags=flags("cpp") if kind == "cpp" else ["-O3", "-std=c++20"],
                extra_cuda_cflags=flags("cuda"),
                extra_ldflags=[f for f in flags(kind) if f == "-fopenmp"],
                build_directory=str(scratch),
                is_python_module=False,
                with_cuda=kind == "cuda",
                verbose=False,
            )
        (scratch / f"qexp_{kind}.so").replace(target)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"the {kind} sources did not compile: {_first_error(str(error))}") from error
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(scratch, ignore_errors=True)


def _translation_units(kind: str, scratch: Path) -> list[str]:
    """Writes one file a source, named after its folder (objects are named after files, and all are called `op`)."""
    units = []
    for path in sources(kind):
        unit = scratch / f"{path.parent.name}_{path.name}"
        unit.write_text(f'#include "{path.as_posix()}"\n')
        units.append(str(unit))
    return units


def _first_error(output: str) -> str:
    """Returns the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), "".join(lines[:1]))
