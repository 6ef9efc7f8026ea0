"""Images per second of 8-bit integers and of floating point on this CPU: `python -m experiments.integers.onnx_speed --out FILE.json`.

onnxruntime runs the file that `export=onnx` writes and the float network; PyTorch runs the float network and the fast executor of the
integer program. All in one process, one batch of each in turn; medians of the rounds. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from experiments.overhead.measure import ROOT, evaluation, figures, quantized
from qexp.callbacks.kernels import load_kernels
from qexp.command.root import register
from qexp.integer import onnx_file
from qexp.integer.fast import Fast
from qexp.integer.lowering import lower
from qexp.integer.program import IntegerProgram
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn

BATCH = {224: 4, 32: 64}  # images per batch, by their width
RECIPE = ("quant=minmax", "bits=w8a8", "deploy=int8")


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


def session(path: Path, threads: int) -> tuple[Any, dict[str, int]]:
    """Returns an onnxruntime session, and how many nodes of each type it runs."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return made, dict(collections.Counter(n.op_type for n in nodes))


def measure(name: str, threads: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Returns what one network takes: images per second of each way, nodes that onnxruntime runs, scores compared."""
    model, program, images = network(name)
    float_file(model, images, scratch / "float.onnx")
    size = onnx_file.write(program, scratch / "int8.onnx")["bytes"]
    ours, codes = Fast(program, watched=()), torch.from_numpy(program.encode(images.numpy()))
    floating, _ = session(scratch / "float.onnx", threads)
    eight, nodes = session(scratch / "int8.onnx", threads)
    fed = {"images": images.numpy()}
    steps: dict[str, Callable[[], Any]] = {
        "onnxruntime float32": lambda: floating.run(None, fed),
        "onnxruntime int8": lambda: eight.run(None, fed),
        "PyTorch float32": evaluation(model, images),
        "fast executor": lambda: ours.run(codes),
    }
    found = figures(steps, rounds, ("onnxruntime float32", "PyTorch float32"))
    theirs, expected = eight.run(None, fed)[0], program.decode(ours.run(codes).numpy())
    return {
        "model": name,
        "batch": len(images),
        "width": images.shape[-1],
        "images_per_second": {k: 1000 * len(images) / v["ms"] for k, v in found.items()},
        "ratio_onnx": 1 / found["onnxruntime int8"]["onnxruntime float32"],
        "ratio_fast": 1 / found["fast executor"]["PyTorch float32"],
        "nodes": nodes,
        "bytes": size,
        "bytes_float": (scratch / "float.onnx").stat().st_size,
        "predictions_differ": int((theirs.argmax(1) != expected.argmax(1)).sum()),
        "scores_differ": float(abs(theirs - expected).mean() / abs(expected).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "resnet20"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--out", type=Path, required=True, help="where the figures go, such as runs/integers_speed/speed.json"
    )
    args = parser.parse_args()
    register()
    torch.set_num_threads(args.threads)
    kernels = load_kernels("auto")
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measure(name, args.threads, args.rounds, Path(scratch)))
        print(json.dumps(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"threads": args.threads, "rounds": args.rounds, "kernels": kernels, "processor": platform.processor()}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
