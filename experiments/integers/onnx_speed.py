"""Images per second of 8-bit integers and of floating point on this CPU: `python -m experiments.integers.onnx_speed --out FILE.json`.

onnxruntime runs the file that `export=onnx` writes and the float network; PyTorch runs the float network, channels innermost and batch
norms folded, which is the baseline, and the fast executor of the integer program. All in one process, a batch of each in random order;
medians of the rounds. onnxruntime's threads sleep while they have no work (`session.intra_op.allow_spinning=0`), for they would slow
whatever else is timed. Each is also timed alone in a process of its own (`--only`). Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from experiments.overhead.measure import evaluation, quantized
from experiments.ruler import ROOT, alone, apart, interleaved
from qexp.callbacks.kernels import load_kernels
from qexp.command.root import register
from qexp.integer import onnx_file
from qexp.integer.fast import Fast
from qexp.integer.lowering import lower
from qexp.integer.program import IntegerProgram
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn
from qexp.system.allocator import settle

BATCH = {224: 4, 32: 64}  # images per batch, by their width
RECIPE = ("quant=minmax", "bits=w8a8", "deploy=int8")
BASE, OURS, THEIRS, THEIR_FLOAT = "PyTorch float32", "fast executor", "onnxruntime int8", "onnxruntime float32"
ARMS = (BASE, OURS, THEIRS, THEIR_FLOAT)
SPINNING = "session.intra_op.allow_spinning"


def network(name: str) -> tuple[nn.Module, IntegerProgram, Tensor]:
    """Returns a float network with random weights and folded batch norms, its integer program, and a batch of random images."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"model={name}", *RECIPE])
    torch.manual_seed(0)
    model = instantiate(cfg.model.net).eval()
    size = list(cfg.model.input_size)
    images = torch.randn(BATCH[size[-1]], *size)
    fold_bn(model, facts(model, images[:1]))
    return model, lower(quantized(cfg, model, images, fold=False), images[:1]).program, images


def float_file(model: nn.Module, images: Tensor, path: Path) -> None:
    """Writes a float network as an ONNX file for any batch size."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is called an old one
        axes = {"images": {0: "N"}, "scores": {0: "N"}}
        names = {"input_names": ["images"], "output_names": ["scores"], "dynamic_axes": axes}
        torch.onnx.export(model, (images[:1],), str(path), dynamo=False, **names)


def session(path: Path, threads: int, *, spinning: bool = False) -> Any:
    """Returns an onnxruntime session; by default its threads sleep while they have no work."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry(SPINNING, str(int(spinning)))
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nodes(path: Path) -> dict[str, int]:
    """Returns how many nodes of each type the session of a file runs."""
    import onnx

    graph = onnx.load(path.with_suffix(".optimized.onnx")).graph
    return dict(collections.Counter(n.op_type for n in graph.node))


def arms(
    model: nn.Module,
    program: IntegerProgram,
    images: Tensor,
    threads: int,
    scratch: Path,
    wanted: tuple[str, ...] = ARMS,
) -> dict[str, Callable[[], Any]]:
    """Returns what is timed, by name; each function runs one batch."""
    steps: dict[str, Callable[[], Any]] = {}
    fed = {"images": images.numpy()}
    if BASE in wanted:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        steps[BASE] = evaluation(last, images.contiguous(memory_format=torch.channels_last))
    if OURS in wanted:
        ours, codes = Fast(program, watched=()), torch.from_numpy(program.encode(images.numpy()))
        steps[OURS] = lambda: ours.run(codes)
    if THEIRS in wanted:
        onnx_file.write(program, scratch / "int8.onnx")
        eight = session(scratch / "int8.onnx", threads)
        steps[THEIRS] = lambda: eight.run(None, fed)
    if THEIR_FLOAT in wanted:
        float_file(model, images, scratch / "float.onnx")
        floating = session(scratch / "float.onnx", threads)
        steps[THEIR_FLOAT] = lambda: floating.run(None, fed)
    return steps


def measure(name: str, threads: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Returns what one network takes: images per second of each way, nodes that onnxruntime runs, scores compared."""
    model, program, images = network(name)
    steps = arms(model, program, images, threads, scratch)
    found = interleaved(steps, rounds, (BASE, THEIRS, THEIR_FLOAT))
    theirs, expected = steps[THEIRS]()[0], program.decode(steps[OURS]().numpy())
    common = ("--models", name, "--threads", str(threads), "--rounds", str(rounds))
    by_itself = {arm: alone("experiments.integers.onnx_speed", *common, "--only", arm) for arm in steps}
    return {
        "model": name,
        "batch": len(images),
        "width": images.shape[-1],
        "images_per_second": {k: 1000 * len(images) / v["ms"] for k, v in found.items()},
        "beside_over_alone": {k: apart(found[k], by_itself[k]) for k in found},
        "ratio_onnx": 1 / found[THEIRS][THEIR_FLOAT],
        "ratio_fast": 1 / found[OURS][BASE],
        "ratio_int8": 1 / found[OURS][THEIRS],
        "nodes": nodes(scratch / "int8.onnx"),
        "bytes": (scratch / "int8.onnx").stat().st_size,
        "bytes_float": (scratch / "float.onnx").stat().st_size,
        "predictions_differ": int((theirs.argmax(1) != expected.argmax(1)).sum()),
        "scores_differ": float(abs(theirs - expected).mean() / abs(expected).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", choices=ARMS, help="times one thing alone and prints its figures")
    parser.add_argument("--out", type=Path, help="where the figures go, such as runs/integers_speed/speed.json")
    args = parser.parse_args()
    if args.out is None and not args.only:
        parser.error("--out FILE.json is needed, or --only")
    register()
    settle()  # as run.py does
    torch.set_num_threads(args.threads)
    kernels = load_kernels("auto")
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            if args.only:
                steps = arms(*network(name), args.threads, Path(scratch), (args.only,))
                print(json.dumps(interleaved(steps, args.rounds, ())[args.only]))
                continue
            rows.append(measure(name, args.threads, args.rounds, Path(scratch)))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"threads": args.threads, "rounds": args.rounds, "kernels": kernels, "torch": torch.__version__}
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
