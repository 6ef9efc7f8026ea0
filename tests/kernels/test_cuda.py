"""What of CUDA can be tested without a device: that the sources compile, and that their absence is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels import build


def test_the_tests_of_this_folder_also_ran_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the tests of the kernels ran on the CPU only")
    assert kernels.load("cuda").implementation == "cuda"


@pytest.mark.slow
def test_cuda_sources_compile_and_leave_the_cpu_kernels_alone(tmp_path):
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        pytest.skip("no nvcc")
    code = (
        "import torch, qexp_kernels as k; from qexp_kernels import build\n"
        "build.load('cuda', build=True)\n"
        f"import os; os.environ['QEXP_CACHE_DIR'] = {str(build.cache_folder())!r}\n"
        "k.load('cpp')\n"
        "x = torch.linspace(-1, 1, 9)\n"
        "assert torch.equal(k.round_to(x * 3), (x * 3).round())\n"
    )
    home = os.environ.get("CUDA_HOME") or ("/usr/local/cuda" if Path("/usr/local/cuda").is_dir() else "")
    env = {**os.environ, "QEXP_CACHE_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": home}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
