"""Runs the kernel tests on C++ built with AddressSanitizer and UBSan: `python -m qexp_kernels.asan`; returns their exit status."""

import os
import subprocess
import sys
from pathlib import Path

from . import build

TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernels"
FLAGS = (
    "-O1",
    "-g1",
    *(flag for flag in build.CPP_FLAGS if flag != "-O3"),
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-omit-frame-pointer",
)
FILES = (
    "test_batch_norm.py",
    "test_equal.py",
    "test_bad_input.py",
    "test_fixed_point.py",
    "test_gradients.py",
    "test_integer.py",
    "test_launches.py",
    "test_unusual_input.py",
)


class CompiledOnly:
    """A pytest plug-in that leaves out tests that run on the reference implementations."""

    def pytest_collection_modifyitems(self, items: list) -> None:
        def runs(item) -> bool:
            return getattr(item, "callspec", None) is None or item.callspec.params.get("implementation") != "reference"

        items[:] = filter(runs, items)


def child() -> int:
    """Builds with the sanitizers, loads, and runs the tests in this process."""
    import pytest

    from .loader import load

    build.CPP_FLAGS = FLAGS
    print(load("cpp").reason, flush=True)
    # faulthandler would catch the signals that the sanitizers use for reports
    options = ["-q", "-n0", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    return pytest.main([*(str(TESTS / name) for name in FILES), *options], plugins=[CompiledOnly()])


def environment() -> dict[str, str]:
    """Returns the environment of a process under the sanitizers, whose libraries are loaded before all others."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # torch's loader links none of them; the first needs functions of the third when it starts
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:"
        + os.environ.get("ASAN_OPTIONS", ""),  # Python does not free its memory at exit
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


def main() -> int:
    """Starts a process with the sanitizer's library loaded before everything else."""
    code = "import sys, qexp_kernels.asan as a; sys.exit(a.child())"
    status = subprocess.run([sys.executable, "-c", code], env=environment()).returncode
    print("AddressSanitizer and UBSan: " + ("no finding" if status == 0 else f"see above (exit status {status})"))
    return status


if __name__ == "__main__":
    sys.exit(main())
