"""What a training step spends its time on, by a profile of one thread: `python -m experiments.overhead.shares [--quant lsq,pact]`.

Each operator's own time (without that of operators it calls), summed by what it does and as a share of all; one column a recipe.
"""

from __future__ import annotations

import argparse

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.profiler import ProfilerActivity, profile

from experiments.overhead.measure import ROOT, quantized, train_step
from qexp.callbacks.kernels import load_kernels
from qexp.command.root import register
from qexp.system.allocator import settle

KINDS = {  # the first that stands in an operator's name
    "quantizers": ("qexp::",),
    "convolutions": ("conv", "mkldnn", "onednn"),
    "batch norms": ("batch_norm",),
    "ReLUs and additions": ("relu", "clamp_min", "threshold", "aten::add"),
}
OTHERS = "everything else"


def shares(step, steps: int) -> dict[str, float]:
    """Returns the percentage of the time of each kind of operator, over some steps after two that do not count."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    spent = dict.fromkeys([*KINDS, OTHERS], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), OTHERS)
        spent[kind] += event.self_cpu_time_total
    return {kind: 100 * time / sum(spent.values()) for kind, time in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--quant", default="lsq,pact", help="recipes, with commas")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    load_kernels("auto")
    register()
    found = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        common = [f"model={args.model}", "dataset=cifar10", f"bits={args.bits}"]
        for quant in args.quant.split(","):
            cfg = compose("config", [*common, f"quant={quant}"])
            torch.manual_seed(0)
            images = torch.randn(args.batch, *cfg.model.input_size).contiguous(memory_format=torch.channels_last)
            model = quantized(cfg, instantiate(cfg.model.net), images, fold=False)
            found[quant] = shares(train_step(model, images, torch.randint(0, 10, (args.batch,))), args.steps)
    print(f"| share of a step, {args.model} {args.bits} | {' | '.join(found)} |\n{'|---' * (1 + len(found))}|")
    for kind in [*KINDS, OTHERS]:
        print(f"| {kind} | {' | '.join(f'{column[kind]:.1f} %' for column in found.values())} |")


if __name__ == "__main__":
    main()
