"""What quantization costs in time, as ratios to floating point: `python -m experiments.overhead.measure --help`.

Variants run interleaved in one process, one step of each in random order, and medians are taken, so that what else the machine does
falls on all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.overhead.peers import PEERS
from experiments.ruler import ROOT, interleaved
from qexp.calibration.calibrate import calibrate
from qexp.callbacks.kernels import load_kernels
from qexp.command.root import register
from qexp.integer.on_codes import on_codes
from qexp.layers.quantized import quantized_layers
from qexp.layers.swap import baked_weights
from qexp.network.facts import facts
from qexp.network.lean_evaluation import lean
from qexp.network.lean_training import lean_training
from qexp.passes.fold_bn import fold_bn
from qexp.run import pipeline
from qexp.run.settings import read
from qexp.system.allocator import settle
from qexp.system.objects import make

PARTS = ("training step", "evaluation")


def quantized(cfg: DictConfig, model: nn.Module, images: Tensor, fold: bool) -> nn.Module:
    """Returns a calibrated copy of the model with the configuration's quantizers."""
    model = copy.deepcopy(model).eval()
    structure = facts(model, images[:1])
    if fold:
        fold_bn(model, structure)
        structure = facts(model, images[:1])
    plan = pipeline.resolve(model, structure, pipeline.recipe(read(cfg)))
    pipeline.apply(model, plan, structure)
    calibrate(model, [images[:32]], progress=False)
    return model


def train_step(model: nn.Module, images: Tensor, labels: Tensor, bfloat16: bool = False) -> Callable[[], None]:
    """Returns one optimizer step of a network as a function, in float32 or with products in bfloat16."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)  # timed, not trained: noise must not diverge
    layers = [layer for _, layer in quantized_layers(model)]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
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


def table(title: str, found: dict[str, dict[str, float]]) -> str:
    """Returns the figures as a Markdown table."""
    bases = [name for name in next(iter(found.values())) if name not in ("ms", "processor_ms")]
    lines = [f"| {title} | ms | {' | '.join(f'/ {b}' for b in bases)} |", "|---" * (2 + len(bases)) + "|"]
    for name, row in found.items():
        lines.append(f"| {name} | {row['ms']:.0f} | {' | '.join(f'{row[b]:.2f}' for b in bases)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--quant", default="lsq,pact,dorefa", help="recipes, with commas")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kernels", default="auto", help="auto, cuda, cpp or reference")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--contiguous", action="store_true", help="images with the channels outermost; else innermost")
    parser.add_argument("--json", type=Path, help="file the figures are written to")
    args = parser.parse_args()
    settle()  # as run.py does
    torch.set_num_threads(args.threads)
    kernels = load_kernels(args.kernels)
    print(f"{args.model}, batch {args.batch}, {args.threads} threads, torch {torch.__version__}, kernels {kernels}")

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        common = [f"model={args.model}", "dataset=cifar10", f"bits={args.bits}"]
        configs = {q: compose("config", [*common, f"quant={q}"]) for q in args.quant.split(",")}
    torch.manual_seed(0)
    model = make(read(next(iter(configs.values()))).network.net).to(args.device)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    images = torch.randn(args.batch, *next(iter(configs.values())).model.input_size).contiguous(memory_format=layout)
    images, labels = images.to(args.device), torch.randint(0, 10, (args.batch,), device=args.device)
    result = {
        "model": args.model,
        "batch": args.batch,
        "bits": args.bits,
        "layout": str(layout).removeprefix("torch."),
        "threads": args.threads,
        "device": args.device,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "kernels": kernels,
        "training step": training(model, configs, images, labels, args.rounds),
        "evaluation": evaluations(model, configs, images, args.rounds),
    }
    for part in PARTS:
        print(f"\n{table(part, result[part])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def training(
    model: nn.Module, configs: dict[str, DictConfig], images: Tensor, labels: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Returns the figures of a training step: float, each recipe as a run trains it, each peer; on a CPU in bfloat16 too."""
    steps = {"float": train_step(copy.deepcopy(model), images, labels)}
    precisions = (False, True) if images.device.type == "cpu" else (False,)
    if True in precisions:
        steps["float, bf16"] = train_step(copy.deepcopy(model), images, labels, bfloat16=True)
    with ExitStack() as held:
        for name, cfg in configs.items():
            for bfloat16 in precisions:
                network = quantized(cfg, model, images, fold=False)
                held.enter_context(lean_training(network, images[:2]))
                steps[f"{name}{', bf16' * bfloat16}"] = train_step(network, images, labels, bfloat16)
        steps |= {name: train_step(peer, images, labels) for name, peer in peers(model, images).items()}
        return interleaved(steps, rounds, ("float",))


def evaluations(
    model: nn.Module, configs: dict[str, DictConfig], images: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Returns the figures of an evaluation batch: float, with folded batch norms, each recipe as a run evaluates it, each peer."""
    folded = copy.deepcopy(model).eval()
    fold_bn(folded, facts(folded, images[:1]))
    networks = {"float": copy.deepcopy(model), "float, BN folded": folded, **peers(model, images)}
    with ExitStack() as held:
        for name, cfg in configs.items():
            networks[name] = quantized(cfg, model, images, fold=True)
            networks[f"{name}, on codes"] = quantized(cfg, model, images, fold=True)
            for kind in (name, f"{name}, on codes"):
                held.enter_context(baked_weights(networks[kind]))
                if kind != name:
                    print(f"{kind}: {held.enter_context(on_codes(networks[kind], images[:1])).line()}")
                held.enter_context(lean(networks[kind], images[:1]))
        return interleaved(
            {n: evaluation(m, images) for n, m in networks.items()}, rounds, ("float", "float, BN folded")
        )


def peers(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """Returns the other toolkits' networks; prints which are not available, and why."""
    made = {name: make(model, images) for name, make in PEERS.items()}
    for name, peer in made.items():
        if isinstance(peer, str):
            print(f"{name}: left out ({peer})")
    return {name: peer for name, peer in made.items() if not isinstance(peer, str)}


if __name__ == "__main__":
    main()
