"""Writes the measured figures into the READMEs of this folder and of `experiments/kernels`: `python -m experiments.overhead.tables`.

Reads the JSON files beside each README and replaces what stands between its `<!-- FILE -->` and `<!-- end FILE -->`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels"
STEP_GOAL = {"resnet20": 1.15, "mobilenetv2": 1.25}
EVALUATION_GOALS = (0.95, 1.15)  # to float, and to float with folded batch norms


def network(found: dict[str, Any]) -> str:
    """Returns what one network costs, as Markdown: a row a recipe, training steps and evaluations side by side."""
    steps, evaluations = found["training step"], found["evaluation"]
    lines = [
        f"| {found['model']}, batch {found['batch']}, {found['bits']} | training step | / float "
        "| evaluation | / float | / float, BN folded |",
        "|---" * 6 + "|",
    ]
    for name in dict.fromkeys([*steps, *evaluations]):
        step, evaluated = steps.get(name), evaluations.get(name)
        cells = [f"{step['ms']:.0f} ms", f"{step['float']:.2f}"] if step else ["", ""]
        ratios = [f"{evaluated[of]:.2f}" for of in ("float", "float, BN folded")] if evaluated else ["", ""]
        cells += [f"{evaluated['ms']:.0f} ms" if evaluated else "", *ratios]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    eager, folded = EVALUATION_GOALS
    lines.append(f"| goal | | <= {STEP_GOAL[found['model']]} | | <= {eager} | <= {folded} |")
    return "\n".join([*lines, "", f"{conditions(found)}, medians of {found['rounds']} rounds, {found['layout']}."])


def operators(found: dict[str, Any]) -> str:
    """Returns what each operator costs against its baseline, as Markdown."""
    lines = ["| measured | ms | against | ms | ratio | goal | |", "|---" * 7 + "|"]
    for f in found["figures"]:
        goal = "" if f["goal"] is None else f"<= {f['goal']:g}"
        verdict = "" if f["goal"] is None else "met" if f["ratio"] <= f["goal"] else "missed"
        numbers = (
            f"{f['milliseconds']:.2f} | {f['baseline_name']} | {f['baseline_milliseconds']:.2f} | {f['ratio']:.3g}"
        )
        lines.append(f"| {f['name']} | {numbers} | {goal} | {verdict} |")
    text = ["\n".join(lines), f"{conditions(found)}."]
    if memory := found.get("memory_mib"):
        times = memory["materialised"] / memory["kernel"]
        text.append(
            f"Memory that the convolutions of one ResNet-18 image add at their peak: {memory['kernel']:.0f} MiB, materialised "
            f"{memory['materialised']:.0f} MiB: 1/{times:.0f} (goal 1/50: {'met' if times >= 50 else 'missed'})."
        )
    return "\n\n".join(text)


def conditions(found: dict[str, Any]) -> str:
    """Returns what the figures hold for."""
    return (
        f"torch {found['torch']}, kernels {found['kernels']}, {found['threads']} thread{'s' * (found['threads'] > 1)}"
    )


def write(readme: Path, tables: dict[str, str]) -> None:
    """Replaces what stands between the markers of each file."""
    text = readme.read_text()
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{readme}: expected {start} and, after it, {end}")
        text = f"{before}{start}\n{table}\n{end}{after}"
    readme.write_text(text)


def main() -> None:
    write(HERE / "README.md", {p.name: network(json.loads(p.read_text())) for p in sorted(HERE.glob("*.json"))})
    write(
        KERNELS / "README.md", {p.name: operators(json.loads(p.read_text())) for p in sorted(KERNELS.glob("cpu*.json"))}
    )


if __name__ == "__main__":
    main()
