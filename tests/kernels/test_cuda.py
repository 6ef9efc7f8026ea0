"""What of CUDA can be tested without a device: the sources compile, are executed on the CPU, and their absence is logged."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels import build, toolkit
from qexp_kernels.examples import arguments
from qexp_kernels.library import REFERENCES
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parent


def test_the_tests_of_this_folder_also_ran_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the tests of the kernels ran on the CPU only")
    assert kernels.load("cuda").implementation == "cuda"


def test_every_operator_has_its_cuda_form():
    text = "".join(path.read_text() for path in build.sources("cuda"))
    assert {name for name in REFERENCES if f'm.impl("{name}", ' not in text} == set()


@pytest.mark.slow
@pytest.mark.timeout(2400)  # three minutes on a quiet machine, and more than ten beside other work
@pytest.mark.parametrize("arguments", [(), ("--sanitize",)], ids=["plain", "sanitized"])
def test_the_cuda_sources_pass_these_tests_when_the_cpu_runs_them(arguments):
    if platform.machine() != "x86_64":
        pytest.skip("the emulation switches between threads with instructions of x86-64")
    command = [sys.executable, str(TESTS / "emulation" / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cuda_sources_compile_without_a_warning_and_load_beside_those_of_the_cpu(tmp_path):
    """For the oldest and the newest capability of a wheel; all of them take minutes more (`python -m qexp_kernels.for_wheel cuda`)."""
    try:
        toolkit.nvcc_command()
    except toolkit.BuildError as error:
        pytest.skip(str(error))
    code = (
        "import pathlib, sys; from qexp_kernels import build\n"
        "build.CUDA_FLAGS = (*build.CUDA_FLAGS, '-Werror', 'all-warnings')\n"
        "library = pathlib.Path(sys.argv[1]) / 'cuda.so'\n"
        "build.compile_library('cuda', library, build.level(), sys.argv[2:])\n"
        "import torch, qexp_kernels as k; k.load('cpp')\n"
        "if torch.version.cuda:\n"  # the runtime that the library looks for is the one torch brought in
        "    torch.ops.load_library(library)\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key('qexp::lsq', 'CUDA')\n"
        "x = torch.linspace(-1, 1, 9)\n"
        "assert torch.equal(k.round_to(x * 3), (x * 3).round())\n"
    )
    known = [c for c in build.CAPABILITIES if c in toolkit.known_capabilities()]
    command = [sys.executable, "-c", code, str(tmp_path), known[0], known[-1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "cuda.so").stat().st_size > 0


def test_any_nvcc_on_the_path_is_enough(tmp_path, monkeypatch):
    """It may be a script that starts the real one, so that the folders around it hold no toolkit."""
    script = tmp_path / "nvcc"
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {torch.version.cuda or '13.0'}, V1'\n")
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert toolkit.nvcc_command() == [str(script)]


def test_a_compiler_of_another_cuda_is_refused_by_name(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V1'\n")
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(toolkit.BuildError, match=r"is of CUDA 11.8, but torch runs on CUDA 13.0"):
        toolkit.nvcc_command()


def test_capabilities_are_compiled_for_by_name_and_newer_devices_are_not_left_out(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;9.0+PTX 10.0")
    assert build.architectures() == ["75", "90", "100"]
    flags = build.architecture_flags(["75", "100"])
    assert flags == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


class Divisors(TorchDispatchMode):
    """Collects the Python numbers that tensors are divided by, but for powers of two, whose reciprocals are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[float] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and not isinstance(args[1], torch.Tensor):
            rounds = (kwargs or {}).get("rounding_mode") is not None
            if not rounds and math.frexp(args[1])[0] != 0.5:
                self.numbers.append(args[1])
        return func(*args, **(kwargs or {}))


def test_no_reference_divides_a_tensor_by_a_number():
    """CUDA multiplies by the reciprocal of a number: other scales than on the CPU, by a unit in the last place."""
    with Divisors() as seen:
        torch.ones(3) / 7
    assert seen.numbers == [7]
    for name, given in arguments(torch.device("cpu"), 3, 5).items():
        given = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in given)
        with Divisors() as seen:
            REFERENCES[name](*given)
        assert not seen.numbers, name


def test_one_library_serves_every_device_of_its_generations_and_newer_ones():
    built = ["75", "80", "90", "100"]
    for device in ("75", "80", "86", "89", "90", "100", "103", "120", "121"):
        assert build.serves(built, [device]), device
    assert not build.serves(built, ["70"]) and not build.serves(["80", "90"], ["75"])
    assert build.serves(built, ["86", "120"]) and not build.serves(built, ["86", "70"])
    assert not build.serves([], ["90"])


@pytest.mark.parametrize(("device", "found"), [("86", True), ("120", True), ("70", False)])
def test_a_cuda_library_in_the_package_is_taken_for_the_devices_it_serves(tmp_path, monkeypatch, device, found):
    monkeypatch.setattr(build, "CARRIED", tmp_path)
    name = build.library_name("cuda", build.level(), build.CAPABILITIES)
    (tmp_path / name).write_bytes(b"a library")
    (tmp_path / name.replace("cuda-", "cuda-1")).write_bytes(b"of another CUDA")
    monkeypatch.setattr(build, "architectures", lambda: [device])
    own = build.library_name("cuda", build.level())
    assert build._carried("cuda", own) == tmp_path / (name if found else own)
