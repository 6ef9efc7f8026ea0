"""What a sweep costs beside its evaluations: `python -m experiments.sweep_cost.measure --weights FILE [--samples N] [--write]`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = "2,3,4,5,6,8"
POINTS = 36
START, END = "<!-- measured -->", "<!-- end -->"


def run(runs: Path, study: str, *overrides: str) -> dict[str, list[float]]:
    """Returns the seconds of each phase of one process."""
    times = runs / f"{study}.json"
    command = [sys.executable, "-m", "experiments.sweep_cost.timed", *overrides, f"runs_dir={runs}", f"study={study}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"QEXP_TIMES": str(times)}, check=True)
    return json.loads(times.read_text())


def overhead(times: dict[str, list[float]]) -> dict[str, float]:
    """Returns the seconds of one process by what they went into."""
    counted = sum(times["total"]) - sum(times.get("aside", [0.0]))
    parts = {
        "start-up": sum(times["startup"]),
        "data": sum(times["data"]),
        "calibration and ranges": sum(times["ranges"]),
        "evaluation": sum(times["evaluate"]),
        "float score": sum(times["reference"]),
    }
    return parts | {"records, table, page": counted - sum(parts.values()), "all": counted}


def table(sweep: dict[str, list[float]], singles: list[dict[str, list[float]]], samples: int) -> str:
    """Returns the Markdown of the figures."""
    ours, alone = overhead(sweep), [overhead(s) for s in singles]
    one = {name: mean(a[name] for a in alone) for name in ours}
    float_once, calibration = median(sweep["float"]), max(sweep["ranges"])
    allowed = POINTS * float_once + calibration
    saved = ("start-up", "data", "calibration and ranges")
    spent, separate = sum(ours[n] for n in saved), POINTS * sum(one[n] for n in saved)
    ao = POINTS * (mean(sweep["ao_calibrate"]) + median(sweep["ao_evaluate"]))
    lines = ["| seconds | sweep of 36 points | one process a point, x 36 |", "|---|---|---|"]
    for name in ours:
        alone_text = "" if name in ("evaluation", "all") else f"{POINTS * one[name]:.0f}"
        lines.append(f"| {name} | {ours[name]:.1f} | {alone_text} |")
    return "\n".join(
        [
            *lines,
            "",
            f"* {samples} test images; a float evaluation with folded batch norms {float_once:.2f} s (median of "
            f"{len(sweep['float'])} taken between the points), a quantized one {median(sweep['evaluate']):.2f} s.",
            f"* The sweep in all, start-up included: {ours['all']:.0f} s = **{ours['all'] / allowed:.2f} x** "
            f"(36 float evaluations + 1 calibration, {allowed:.0f} s).",
            f"* Start-up, data and calibration: {spent:.1f} s against {separate:.0f} s of 36 processes (the mean of {len(singles)} run, "
            f"each with an empty cache): **{100 * (1 - spent / separate):.1f} % saved**.",
            f"* torch.ao at the same widths (histogram observers, fake-quantize on inputs, weights quantized once): "
            f"{mean(sweep['ao_calibrate']):.1f} s calibration and {median(sweep['ao_evaluate']):.2f} s evaluation a point "
            f"(of {len(sweep['ao_evaluate'])} measured), {ao:.0f} s for 36: {ao / allowed:.2f} x.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument(
        "--singles", type=int, default=3, help="points run in a process of their own, with an empty cache"
    )
    parser.add_argument("--evaluate", choices=("codes", "float"), default="codes", help="how the points are evaluated")
    parser.add_argument("--write", action="store_true", help="put the figures into README.md")
    args = parser.parse_args()
    common = ["model=resnet20", "dataset=cifar10", f"weights={args.weights}", "quant=mse", "trainer=cpu"]
    common += [f"evaluate={args.evaluate}", "trainer.channels_last=true"]
    singles = []
    for bits in (2, 4, 8)[: args.singles]:
        with tempfile.TemporaryDirectory() as folder:
            widths = (f"layer_wbit={bits}", f"layer_abit={bits}", "max_samples=500")
            singles.append(run(Path(folder), "single", *common, *widths))
    with tempfile.TemporaryDirectory() as folder:
        widths = (f"layer_wbit={WIDTHS}", f"layer_abit={WIDTHS}", f"max_samples={args.samples}")
        sweep = run(Path(folder), "sweep_cost", "-m", *common, *widths)
    text = table(sweep, singles, args.samples)
    print(text)
    if args.write:
        readme = Path(__file__).with_name("README.md")
        before, rest = readme.read_text().split(START)
        readme.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
