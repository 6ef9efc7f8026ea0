"""Runs the kernel tests and benchmarks on a machine with a GPU and writes one JSON: `python -m qexp_kernels.gpu_check`."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from .bench import figures, table
from .loader import load
from .timing import Measure, figure

TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernels"


def bandwidth(device: torch.device) -> dict[str, float]:
    """Returns the share of the device's copy bandwidth that fake quantization reaches on 256 MiB of float32."""
    x = torch.randn(64 << 20, device=device)
    scale, zero, out = torch.full((1,), 0.1, device=device), torch.zeros(1, device=device), torch.empty_like(x)
    from .fake_quantize import fake_quantize

    def copy():
        out.copy_(x)

    def backward():
        torch.ops.qexp.fake_quantize_backward(x, x, scale, zero, -8.0, 7.0, None, None)

    forward = figure(Measure("", lambda: fake_quantize(x, scale, zero, -8, 7), "", copy), device, 50)
    back = figure(Measure("", backward, "", copy), device, 50)
    return {
        "copy_gb_per_s": 2 * x.nbytes / forward.baseline_milliseconds / 1e6,
        "forward_share": 1 / forward.ratio,
        "backward_share": 1.5 / back.ratio,  # it moves three tensors where the copy moves two
    }


def main() -> int:
    """Runs everything; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    loaded = load("cuda")
    device = torch.device("cuda")
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernels": loaded._asdict(),
    }
    print(f"{result['gpu']}, torch {result['torch']}, kernels: {loaded.reason}")
    status = 0
    if not arguments.skip_tests:
        command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-k", "cuda", "-p", "no:cacheprovider"]
        tests = subprocess.run(command, capture_output=True, text=True)
        status = tests.returncode
        result["tests"] = {"status": status, "tail": tests.stdout.splitlines()[-15:]}
        print("\n".join(result["tests"]["tail"]))
    result["bandwidth"] = bandwidth(device)
    found = figures(device)
    result["figures"] = [f._asdict() for f in found]
    print(json.dumps(result["bandwidth"]), table(found), sep="\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
