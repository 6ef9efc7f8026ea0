"""Runs the kernel tests and benchmarks on a machine with a GPU and writes one JSON: `python -m qexp_kernels.gpu_check`.

Needs torch, pytest and nvcc; the cost of a training step, which needs what the package itself does, is left out with the reason
where that is missing. In a clone that is not installed, `ln -s kernels qexp_kernels` comes first.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .bench import figures, table
from .loader import load
from .timing import Measure, figure

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "kernels"
# Only the kernels' own fixtures and no settings of the project: neither Hydra nor pytest's plugins need be there.
PYTEST = ("-q", "-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(TESTS), "--import-mode=importlib")
NETWORKS = {"resnet20": 512, "resnet50": 64}  # images a batch


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


def tests() -> dict[str, int | list[str]]:
    """Returns the exit status of the tests that run on CUDA, and the end of what they printed."""
    command = [sys.executable, "-m", "pytest", str(TESTS), *PYTEST, "-k", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"status": done.returncode, "tail": (done.stdout + done.stderr).splitlines()[-15:]}


def steps(model: str, batch: int, device: str = "cuda", rounds: int = 30) -> dict:
    """Returns what a training step and an evaluation of a quantized network cost against floating point."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        options = {"--model": model, "--batch": batch, "--device": device, "--rounds": rounds, "--json": out}
        words = [str(word) for option in options.items() for word in option]
        command = [sys.executable, "-m", "experiments.overhead.measure", "--quant", "lsq,pact", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return json.loads(out.read_text()) if out.exists() else {"left out": done.stderr.splitlines()[-3:]}


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
        result["tests"] = tests()
        status = result["tests"]["status"]
        print("\n".join(result["tests"]["tail"]))
    result["bandwidth"] = bandwidth(device)
    found = figures(device)
    result["figures"] = [f._asdict() for f in found]
    print(json.dumps(result["bandwidth"]), table(found), sep="\n")
    result["steps"] = {model: steps(model, batch) for model, batch in NETWORKS.items()}
    print(json.dumps(result["steps"], indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
