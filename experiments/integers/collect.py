"""The tables of this study: `python -m experiments.integers.collect runs/integers [--speed FILE.json]`.

One row a run: its proof, and how the share of codes that differ from real scales grows from the first tensors to the last; a line for
each package, ONNX file, archive and set of FPGA files; accuracy against the width of the register, and `accumulator.svg` beside this
file; images per second, of the file that `experiments.integers.onnx_speed` wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from qexp.results import wording

HEAD = (
    "run", "images", "codes", "differ", "predictions", "real scales: codes", "first / last tensors", "by at most", "predictions",
    "top-1 simulated", "top-1 integers",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 50, 40
COLORS = ("#0b6e99", "#b3541e", "#4b7f3a", "#7a4fa0")
DASHES = {"saturate": "", "wrap": "6 4"}
DEPLOYED = {"deploy_activations": "deploy=int8", "deploy_sums": "deploy=integer"}  # by rules that those add
ENDS = 5  # tensors at either end of a network whose share is averaged


def records(study: Path) -> Iterator[tuple[Path, dict]]:
    """Yields folder and record of each run, in the order of their names."""
    found = []
    for path in study.glob("*/metrics.json"):
        config = (path.parent / "config.yaml").read_text()
        deploy = next((word for rule, word in DEPLOYED.items() if rule in config), "")
        found.append((path.parent, json.loads(path.read_text()) | {"deploy": deploy}))
    yield from sorted(found, key=lambda pair: (pair[1].get("model", ""), name(pair[1])))


def proofs(study: Path) -> list[str]:
    """Returns the Markdown table of a study's proofs."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for folder, record in records(study):
        if record["status"] != "ok" or "verify" not in record:
            lines.append(f"| {name(record)} | {record.get('error') or 'not proven'} |" + " |" * (len(HEAD) - 2))
            continue
        table = pd.read_csv(folder / "integer.csv")
        shares = table.share_real_scales.dropna()
        same = record["n_eval"] == record["verify_images"]
        cells = (
            name(record), f"{record['verify_images']:,}", f"{table.codes.sum():,}", f"{record['verify_codes_differ']:,}",
            record["verify_predictions_differ"], f"{record['verify_codes_differ_real_scales']:.4f} %",
            f"{shares.head(ENDS).mean():.3f} / {shares.tail(ENDS).mean():.3f} %", record["verify_most_real_scales"],
            record["verify_predictions_differ_real_scales"],
            f"{record['value']:.2f}" + ("" if same else f" ({record['n_eval']:,})"), f"{record['value_integer']:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def name(record: dict) -> str:
    """Returns what a row is called."""
    added = " " + record["deploy"] if record["deploy"] else ""
    return f"{record['model']} {record['quant']} {wording.asked(record)}{added}"


def taken(study: Path) -> list[str]:
    """Returns a line for each thing that was made of a run."""
    lines = []
    for _, record in records(study):
        floats = f"float {record.get('weight_bytes_float') or 0:,}"
        if "package_bytes" in record:
            lines.append(
                f"* {name(record)}, package: weights {record['package_bytes']:,} bytes ({floats}); compiled C: "
                f"{record['package_c'] or 'not tried'}"
            )
        for form, whose in (("onnx", "integers'"), ("torch", "simulation's")):
            if f"{form}_bytes" in record:
                score = f"; top-1 {record['value_onnx']:.2f}" if form == "onnx" else ""
                lines.append(
                    f"* {name(record)}, {form}: {record[f'{form}_bytes']:,} bytes; {record[f'{form}_predictions_differ']} of "
                    f"{record[f'{form}_images']:,} predictions differ from the {whose}{score}"
                )
        if "fpga_bytes" in record:
            lines.append(
                f"* {name(record)}, FPGA files: {record['fpga_bytes']:,} bytes, weights {record['fpga_weight_bytes']:,} ({floats})"
            )
    return lines


def speed(path: Path) -> list[str]:
    """Returns the tables of images per second that a measurement left."""
    found = json.loads(path.read_text())
    lines = [
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}, torch {found['torch']}, kernels {found['kernels']}, medians of "
        f"{found['rounds']} rounds in random "
        "order, random weights. Baseline: PyTorch float32, channels innermost, batch norms folded. *Beside / alone*: the greatest ratio of "
        "a way's processor time beside the others to that in a process of its own.",
        "",
        "| network | batch | PyTorch float32 | fast executor | / PyTorch | onnxruntime int8 | fast executor / onnxruntime int8 "
        "| onnxruntime float32 | int8 / float32 | layers in integers / float | predictions that differ | beside / alone |",
        "|---" * 12 + "|",
    ]
    for row in found["rows"]:
        per, nodes = row["images_per_second"], row["nodes"]
        eight = sum(nodes.get(kind, 0) for kind in ("QLinearConv", "QGemm", "QLinearMatMul"))
        floating = sum(nodes.get(kind, 0) for kind in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
        cells = (
            f"{row['model']}, {row['width']} pixels", row["batch"], f"{per['PyTorch float32']:.1f}", f"{per['fast executor']:.1f}",
            f"{row['ratio_fast']:.2f}", f"{per['onnxruntime int8']:.1f}", f"{row['ratio_int8']:.2f}", f"{per['onnxruntime float32']:.1f}",
            f"{row['ratio_onnx']:.2f}", f"{eight} / {floating}", f"{row['predictions_differ']} of {row['batch']}",
            f"{max(row['beside_over_alone'].values()):.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def accumulators(study: Path) -> tuple[list[str], str]:
    """Returns the tables of accuracy against the accumulator's width, and a drawing (SVG) of them all."""
    lines, tables = [], {}
    for folder, record in records(study):
        if not (folder / "accumulator.csv").exists():
            continue
        table = pd.read_csv(folder / "accumulator.csv").rename(columns={"value": "top1"})  # networks of classes all
        title = f"{name(record)}, {int(table.images.iloc[0]):,} images"
        tables[title] = table
        lines += [
            "",
            title,
            "",
            "| bits | overflow | top-1 | sums that overflow | worst layer |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.bits} | {r.overflow} | {r.top1:.2f} | {r.share:.4f} % | {'' if pd.isna(r.worst_layer) else r.worst_layer} |"
            for r in table.itertuples()
        ]
    return lines, draw(tables) if tables else ""


def draw(tables: dict[str, pd.DataFrame]) -> str:
    """Returns an SVG: top-1 against bits, a colour a network, a dash for wrapping."""
    widths = sorted({int(b) for table in tables.values() for b in table.bits})
    low, high = widths[0], widths[-1]

    def place(bits: float, top1: float) -> tuple[float, float]:
        across, up = (bits - low) / max(high - low, 1), top1 / 100
        return LEFT + across * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - 40)

    def text(x: float, y: float, words: object, anchor: str = "middle", style: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{style}>{words}</text>'

    parts = [text(LEFT, 20, "Top-1 (%) against accumulator width; solid: saturates, dashed: wraps", "start")]
    for top1 in range(0, 101, 20):
        (x0, y), (x1, _) = place(low, top1), place(high, top1)
        parts += [f'<path d="M{x0:.0f} {y:.1f}H{x1:.0f}" stroke="#d5d5d5"/>', text(x0 - 8, y + 4, top1, "end")]
    parts += [text(place(bits, 0)[0], HEIGHT - 20, bits) for bits in widths]
    parts.append(text(place((low + high) / 2, 0)[0], HEIGHT - 3, "bits of the accumulator, sign included"))
    for i, (title, table) in enumerate(tables.items()):
        color = COLORS[i % len(COLORS)]
        for overflow, rows in table.sort_values("bits").groupby("overflow"):
            points = [place(r.bits, r.top1) for r in rows.itertuples()]
            dash = DASHES[str(overflow)]
            parts.append(polyline(points, f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'))
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        parts.append(text(LEFT, HEIGHT + 20 + 18 * i, f"● {title}", "start", f' style="fill:{color}"'))
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    body, tall = "\n".join(parts), HEIGHT + 10 + 18 * len(tables)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" {style}>\n{body}\n</svg>\n'


def polyline(points: Iterable[tuple[float, float]], style: str) -> str:
    """Returns a line through points."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {style}/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's folder, such as runs/integers")
    parser.add_argument("--speed", type=Path, help="figures of experiments.integers.onnx_speed")
    args = parser.parse_args()
    lines, drawing = accumulators(args.study)
    print("\n".join([*proofs(args.study), "", *taken(args.study), *lines]))
    if drawing:
        (Path(__file__).parent / "accumulator.svg").write_text(drawing)
    if args.speed:
        print("\n" + "\n".join(speed(args.speed)))


if __name__ == "__main__":
    main()
