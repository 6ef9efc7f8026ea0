"""Runs the kernel tests on the CUDA sources, compiled as C++ and executed on the CPU: `run.py [--sanitize] [pytest's arguments]`."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qexp_kernels import asan, build

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
FLAGS = ("-O1", "-DQEXP_EMULATION", "-x", "c++", "-w", f"-I{HERE}", f"-I{build.HERE / 'common'}")


def library(sanitize: bool) -> Path:
    """Returns the compiled sources, built where the cache lacks them."""
    changed = [*build.sources("cuda"), *build.HERE.glob("*/*.h"), *build.HERE.glob("*/*.cuh"), *HERE.glob("*")]
    text = b"".join(path.read_bytes() for path in sorted(changed) if path.is_file())
    target = build.cache_folder() / f"emulated-{'sanitized-' * sanitize}{hashlib.sha256(text).hexdigest()[:20]}.so"
    if target.exists():
        return target
    flags = [*(asan.FLAGS if sanitize else build.CPP_FLAGS), *FLAGS]
    target.parent.mkdir(parents=True, exist_ok=True)
    build.sources, before = lambda kind: sorted(build.HERE.glob("*/*.cu")), build.sources
    build.flags, flags_before = lambda kind, level: [build.TARGET, *flags], build.flags
    try:
        build.compile_library("cpp", target, build.level())
    finally:
        build.sources, build.flags = before, flags_before
    return target


class Emulated:
    """A plug-in of pytest: what the C++ kernels are to be is the emulation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_configure(self, config: pytest.Config) -> None:
        def load(kind: str, *, build: bool) -> str:
            torch.ops.load_library(self.path)
            return f"emulated by {self.path}"

        build.load = load


def main() -> int:
    """Builds and runs; with `--sanitize` in a process that AddressSanitizer and UBSan watch."""
    arguments = sys.argv[1:]
    sanitize = "--sanitize" in arguments
    if sanitize and not os.environ.get("QEXP_SANITIZED"):
        environment = asan.environment() | {"QEXP_SANITIZED": "1"}
        return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode
    arguments = [a for a in arguments if a != "--sanitize"]
    named = any(not a.startswith("-") and a.split("::")[0].endswith(".py") for a in arguments)
    files = [] if named else [str(TESTS / name) for name in asan.FILES]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist", "-m", "not slow"]
    return pytest.main([*files, *options, *arguments], plugins=[Emulated(library(sanitize)), asan.CompiledOnly()])


if __name__ == "__main__":
    sys.exit(main())
