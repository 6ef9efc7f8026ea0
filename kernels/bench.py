"""Times every operator against its baseline and prints the ratios: `python -m qexp_kernels.bench`."""

import argparse
import importlib
import json
import platform
from pathlib import Path

import torch

from .fixed_point.bench import peak
from .loader import load
from .timing import Figure, figure

HERE = Path(__file__).parent


def figures(device: torch.device, only: str = "", rounds: int = 15) -> list[Figure]:
    """Returns the figures of the `bench.py` of every operator whose folder name contains `only`."""
    found = []
    for path in sorted(HERE.glob("*/bench.py")):
        if only in path.parent.name:
            module = importlib.import_module(f"{__package__}.{path.parent.name}.bench")
            found += [figure(m, device, rounds) for m in module.measures(device)]
    return found


def environment(device: torch.device) -> dict[str, str | int]:
    """Returns the conditions of the figures: implementation, torch, processor and threads."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def table(found: list[Figure]) -> str:
    """Returns the figures as a Markdown table."""
    lines = ["| measured | ms | against | ms | ratio | goal |", "|---|---|---|---|---|---|"]
    for f in found:
        goal = "" if f.goal is None else f"<= {f.goal:g}"
        lines.append(
            f"| {f.name} | {f.milliseconds:.2f} | {f.baseline_name} | {f.baseline_milliseconds:.2f} "
            f"| {f.ratio:.3g} | {goal} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, prints the table and, with `--json`, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", default="auto", help="auto, cuda, cpp or reference")
    parser.add_argument("--only", default="", help="part of an operator's folder name")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="also print the memory of the convolutions of one image")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    loaded = load(arguments.kernels)
    print(f"kernels: {loaded.implementation} ({loaded.reason}), torch {torch.__version__}")
    print(f"device: {arguments.device}, threads: {torch.get_num_threads()}\n")
    found = figures(torch.device(arguments.device), arguments.only, arguments.rounds)
    print(table(found))
    memory = {name: peak(name) for name in ("kernel", "materialised")} if arguments.memory else None
    if memory:
        print("\npeak memory of a ResNet-18 image, MiB:", memory)
    if arguments.json:
        result = {
            **environment(torch.device(arguments.device)),
            "kernels": loaded.implementation,
            "figures": [f._asdict() for f in found],
            "memory_mib": memory,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
