"""Checks and times the kernels on a machine with a GPU: `python -m qexp_kernels.gpu_check`, in a clone or installed.

Needs torch, pytest and nvcc (on the path, in /usr/local/cuda, under CUDA_HOME, or from pip). Steps that need anything else that is missing
are skipped with the reason. The JSON is written after every step; a second start continues after the last one; `--again` starts over.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from . import build
from .bench import figures
from .examples import arguments
from .library import REFERENCES
from .loader import load
from .timing import Measure, figure

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "kernels"
# Only the kernels' own fixtures and no settings of the project: neither Hydra nor pytest's plugins are needed.
PYTEST = ("-q", "-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(TESTS), "--import-mode=importlib")
NETWORKS = {"resnet20": 512, "resnet50": 64}  # images per batch


def identity() -> dict[str, str]:
    """Returns the conditions of the results; if they differ, no result of an earlier file is kept."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "kernels": build.library_name("cuda", build.level()),
    }


def differences(device: torch.device, images: int = 64, size: int = 33) -> dict[str, list[dict]]:
    """Returns, per operator and result, the difference between device and CPU, for any implementation on either."""
    found = {}
    here, there = arguments(torch.device("cpu"), images, size), arguments(device, images, size)
    for name in REFERENCES:
        op = getattr(torch.ops.qexp, name).default
        pairs = [(t if isinstance(t, tuple) else (t,)) for t in (op(*here[name]), op(*there[name]))]
        found[name] = [_difference(a.detach(), b.detach().cpu()) for a, b in zip(*pairs, strict=True)]
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, int | float]:
    unequal = ~((a == b) | (a.isnan() & b.isnan()))
    largest = (a.double() - b.double()).abs()[unequal].max().item() if bool(unequal.any()) else 0.0
    return {"elements": a.numel(), "unequal": int(unequal.sum()), "largest_difference": largest}


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
    """Returns the exit status of the tests that run on CUDA, and the end of their output."""
    command = [sys.executable, "-m", "pytest", str(TESTS), *PYTEST, "-k", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"status": done.returncode, "tail": (done.stdout + done.stderr).splitlines()[-15:]}


def step_of(model: str, batch: int, device: str = "cuda", rounds: int = 30) -> dict:
    """Returns the cost of a training step and of an evaluation of a quantized network, relative to floating point."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        options = {"--model": model, "--batch": batch, "--device": device, "--rounds": rounds, "--json": out}
        words = [str(word) for option in options.items() for word in option]
        command = [sys.executable, "-m", "experiments.overhead.measure", "--quant", "lsq,pact", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return json.loads(out.read_text()) if out.exists() else {"left out": done.stderr.splitlines()[-3:]}


def parts(device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns the checks in order: correctness before speed."""
    networks = {f"steps, {model}": lambda m=model, b=batch: step_of(m, b) for model, batch in NETWORKS.items()}
    return {
        "differences": lambda: differences(device),
        "tests": tests,
        "bandwidth": lambda: bandwidth(device),
        "figures": lambda: [f._asdict() for f in figures(device)],
        **networks,
    }


def run(out: Path, todo: dict[str, Callable[[], object]], head: dict[str, str], again: bool = False) -> dict:
    """Returns all results: those in the file and the missing ones, which are computed; the file is complete after every part.

    A part that raises is recorded with its error, and runs again at the next start.
    """
    result = json.loads(out.read_text()) if out.exists() and not again else {}
    if any(result.get(key) != value for key, value in head.items()):
        result = dict(head)
    for name, part in todo.items():
        if name in result and "error" not in result[name]:
            print(f"{name}: kept of {out}")
            continue
        try:
            result[name] = part()
        except Exception as error:
            result[name] = {
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc().splitlines()[-6:],
            }
        print(f"{name}: {json.dumps(result[name], indent=1)}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = out.with_suffix(".part")
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(out)
    return result


def main() -> int:
    """Runs all remaining parts; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--again", action="store_true", help="ignore the results in the file")
    chosen = parser.parse_args()
    loaded = load("cuda")
    head = identity()
    print(f"{head['gpu']}, torch {head['torch']}, kernels: {loaded.reason}")
    result = run(chosen.out, parts(torch.device("cuda")), head, chosen.again)
    failed = [name for name, found in result.items() if isinstance(found, dict) and "error" in found]
    return result["tests"].get("status", 1) or len(failed)


if __name__ == "__main__":
    sys.exit(main())
