"""What quantization costs in time, as ratios to floating point: `python -m experiments.overhead.measure --help`.

Variants run interleaved in one process, one step of each in turn, and the median of each is taken, so that what else the machine does
falls on all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from qexp import pipeline
from qexp.calibration.calibrate import calibrate
from qexp.callbacks.kernels import load_kernels
from qexp.config import register
from qexp.graph import facts
from qexp.layers.quantized import quantized_layers
from qexp.layers.swap import baked_weights
from qexp.passes.fold_bn import fold_bn

ROOT = Path(__file__).resolve().parents[2]


def quantized(cfg: DictConfig, model: nn.Module, images: Tensor, fold: bool) -> nn.Module:
    """Returns a calibrated copy of the model with the configuration's quantizers."""
    model = copy.deepcopy(model).eval()
    structure = facts(model, images[:1])
    if fold:
        fold_bn(model, structure)
        structure = facts(model, images[:1])
    plan = pipeline.resolve(model, structure, pipeline.recipe(cfg))
    pipeline.apply(model, plan, structure)
    calibrate(model, [images[:32]], progress=False)
    return model


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Returns one optimizer step of a network as a function."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    layers = [layer for _, layer in quantized_layers(model)]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        for layer in layers:
            layer.after_optimizer_step()

    return step


def evaluation(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Returns one evaluation batch of a network as a function."""
    model.eval()

    def step() -> None:
        with torch.no_grad():
            model(images)

    return step


def medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each step, run in turn, the first two rounds not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def report(title: str, seconds: dict[str, float], base: str) -> None:
    """Prints each variant's median and its ratio to the base."""
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:<24} {1000 * value:9.1f} ms   {value / seconds[base]:5.2f} x {base}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--quant", default="lsq,pact,dorefa", help="recipes, with commas")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kernels", default="auto", help="auto, cuda, cpp or reference")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.model}, batch {args.batch}, {args.threads} threads, torch {torch.__version__}, kernels {load_kernels(args.kernels)}"
    )

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        common = [f"model={args.model}", "dataset=cifar10", f"bits={args.bits}"]
        configs = {q: compose("config", [*common, f"quant={q}"]) for q in args.quant.split(",")}
    model = pipeline.instantiate(next(iter(configs.values())).model.net)
    images = torch.randn(args.batch, *next(iter(configs.values())).model.input_size)
    labels = torch.randint(0, 10, (args.batch,))

    training = {"float": train_step(copy.deepcopy(model), images, labels)}
    training |= {q: train_step(quantized(cfg, model, images, fold=False), images, labels) for q, cfg in configs.items()}
    report("training step", medians(training, args.rounds), "float")

    folded = copy.deepcopy(model).eval()
    fold_bn(folded, facts(folded, images[:1]))
    evaluated = {"float": copy.deepcopy(model), "float, BN folded": folded}
    evaluated |= {q: quantized(cfg, model, images, fold=True) for q, cfg in configs.items()}
    with _all_baked(list(evaluated.values())):
        report("evaluation", medians({n: evaluation(m, images) for n, m in evaluated.items()}, args.rounds), "float")


class _all_baked:
    """Holds the quantized weights of several networks inside a `with` block."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.contexts = [baked_weights(m) for m in models]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in self.contexts:
            context.__exit__(*error)


if __name__ == "__main__":
    main()
