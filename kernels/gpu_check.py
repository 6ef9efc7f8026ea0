"""Checks and times the kernels on a machine with a GPU: `python -m qexp_kernels.gpu_check`, in a clone or installed.

Needs torch, pytest and nvcc (on the path, in /usr/local/cuda, under CUDA_HOME, or from pip). Steps that need anything else that is missing
are skipped with the reason. The JSON is written after every step; a second start continues after the last one; `--again` starts over.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from . import build
from .bench import figures
from .examples import arguments
from .fixed_point.bench import convolutions
from .library import REFERENCES
from .loader import load
from .timing import Measure, figure

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "kernels"
# Only the kernels' own fixtures and no settings of the project: neither Hydra nor pytest's plugins are needed.
PYTEST = ("-q", "-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(TESTS), "--import-mode=importlib")
NETWORKS = {"resnet20": 512, "mobilenetv2": 256, "resnet18": 256, "resnet50": 64}  # images per batch
WIDTHS = "2,3,4,5,6,8"


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
        pairs = [(t if isinstance(t, tuple | list) else (t,)) for t in (op(*here[name]), op(*there[name]))]
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


def sweep() -> dict:
    """Returns the outcome and the seconds of a sweep of 36 points on the embedded digits, in one process, start to page."""
    with tempfile.TemporaryDirectory() as folder:
        widths = [f"layer_{site}bit={WIDTHS}" for site in "wa"]
        options = ["quant=mse", *widths, "trainer=gpu", f"runs_dir={folder}", "study=sweep"]
        began = time.perf_counter()
        command = [sys.executable, "run.py", "-m", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        table = Path(folder) / "sweep" / "results.csv"
        if not table.exists():
            return {"left out": done.stderr.splitlines()[-3:]}
        rows = list(csv.DictReader(table.open()))
        good = sum(row["status"] == "ok" for row in rows)
        return {"status": done.returncode, "points": len(rows), "ok": good, "seconds": round(seconds, 1)}


def memory(device: torch.device) -> dict[str, float]:
    """Returns the device memory in MiB that the products of a convolution take, fused and materialised."""
    found = {}
    for which in ("kernel", "materialised"):
        load("cuda" if which == "kernel" else "reference")
        work = convolutions(which, device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        found[which] = round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
        del work
        torch.cuda.empty_cache()
    load("cuda")
    return found


def waits(device: torch.device) -> dict[str, int]:
    """Runs training steps of a quantized network in which every wait of the host for the device is an error."""
    from .lsq import lsq

    x = torch.randn(64, 32, 14, 14, device=device, requires_grad=True)
    scale = torch.full((1,), 0.1, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([x, scale], lr=0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            lsq(x, scale, -8, 7).square().mean().backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"steps": 3}


def graph(device: torch.device) -> dict[str, bool]:
    """Returns whether a captured CUDA graph of an operator computes what the operator computes, on new numbers."""
    from .fake_quantize import fake_quantize

    x, scale, zero = (
        torch.randn(1 << 16, device=device),
        torch.full((1,), 0.1, device=device),
        torch.zeros(1, device=device),
    )
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        fake_quantize(x, scale, zero, -8, 7)
    torch.cuda.current_stream(device).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = fake_quantize(x, scale, zero, -8, 7)
    x.normal_()
    captured.replay()
    return {"equal": bool(torch.equal(y, fake_quantize(x, scale, zero, -8, 7)))}


def parts(device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns the checks in order: correctness before speed."""
    networks = {f"steps, {model}": lambda m=model, b=batch: step_of(m, b) for model, batch in NETWORKS.items()}
    return {
        "differences": lambda: differences(device),
        "tests": tests,
        "no waits": lambda: waits(device),
        "CUDA graph": lambda: graph(device),
        "bandwidth": lambda: bandwidth(device),
        "memory": lambda: memory(device),
        "figures": lambda: [f._asdict() for f in figures(device)],
        **networks,
        "sweep of 36 points": sweep,
    }


def table(result: dict) -> str:
    """Returns the results as one Markdown table: what was checked, what was found, and the goal where there is one."""
    lines = ["| checked | found | goal |", "|---|---|---|"]
    for name, found in result.items():
        if isinstance(found, dict) and "error" in found:
            lines.append(f"| {name} | failed: {found['error']} | |")
        elif isinstance(found, dict) and "left out" in found:
            lines.append(f"| {name} | left out: {' '.join(found['left out'])} | |")
        elif name == "differences":
            wrong = [op for op, results in found.items() if any(one["unequal"] for one in results)]
            text = f"{len(wrong)} of {len(found)} operators differ{': ' * bool(wrong)}{', '.join(wrong)}"
            lines.append(f"| CUDA against the CPU | {text} | 0 |")
        elif name == "tests":
            lines.append(f"| tests on CUDA | {(found['tail'] or [''])[-1]} | exit status 0: {found['status']} |")
        elif name == "bandwidth":
            share = min(found["forward_share"], found["backward_share"])
            lines.append(f"| least share of copy bandwidth | {share:.2f} | >= 0.85 |")
        elif name == "figures":
            lines += [
                f"| {f['name']} / {f['baseline_name']} | {f['ratio']:.3g} | {'' if f['goal'] is None else '<= ' + format(f['goal'], 'g')} |"
                for f in found
            ]
        elif name.startswith("steps, "):
            for quant, row in found["training step"].items():
                goal = "<= 1.15" if name == "steps, resnet18" else ""
                if quant != "float":
                    lines.append(
                        f"| {name.removeprefix('steps, ')}, {quant}: training step / float | {row['float']:.2f} | {goal} |"
                    )
        else:
            text = ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else found
            lines.append(f"| {name} | {text} | |")
    return "\n".join(lines)


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
    print(f"\n{table(result)}")
    failed = [name for name, found in result.items() if isinstance(found, dict) and "error" in found]
    return result["tests"].get("status", 1) or len(failed)


if __name__ == "__main__":
    sys.exit(main())
