"""The tables of this study: `python -m experiments.integers.collect runs/integers [--accumulators runs/accumulators]`.

One row a run: its proof on the most images that its log holds, what the record says of the integers' own score, and of its package and ONNX
file. With `--accumulators`, `accumulator.svg` beside this file: accuracy against the width of the register.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

PROOF = re.compile(
    r"against simulation, (?P<images>\d+) images: \w+ \((?P<differ>\d+) of (?P<codes>\d+) codes differ with integer rounding, "
    r"(?P<predictions>\d+) predictions\); against real scales (?P<share>[\d.]+) % of codes differ, (?P<real>\d+) predictions"
)
HEAD = (
    "run", "images", "codes", "differ", "predictions", "real scales: codes", "real scales: predictions", "top-1 simulated (images)",
    "top-1 integers (images)",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 50, 40
LINES = {"saturate": ("#0b6e99", ""), "wrap": ("#b3541e", "6 4")}


def proofs(study: Path) -> list[str]:
    """Returns the Markdown table of a study's proofs."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for path in sorted(study.glob("*/metrics.json")):
        record = json.loads(path.read_text())
        found = [m.groupdict() for m in PROOF.finditer((path.parent / "log.txt").read_text())]
        if record["status"] != "ok" or "verify" not in record:
            lines.append(f"| {name(record)} | {record.get('error') or 'not proven'} |" + " |" * (len(HEAD) - 2))
            continue
        best = max(found, key=lambda m: int(m["images"])) if found else recorded(record, path.parent)
        cells = (
            name(record), f"{int(best['images']):,}", f"{int(best['codes']):,}", best["differ"], best["predictions"],
            f"{float(best['share']):.4f} %", best["real"], f"{record['value']:.2f} ({record['n_eval']:,})",
            f"{record['value_integer']:.2f} ({record['verify_images']:,})",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def recorded(record: dict, folder: Path) -> dict[str, str]:
    """Returns the proof as the record has it, where the log lacks its line."""
    codes = int(pd.read_csv(folder / "integer.csv").codes.sum())
    values = {
        "images": record["verify_images"], "codes": codes, "differ": record["verify_codes_differ"],
        "predictions": record["verify_predictions_differ"], "share": record["verify_codes_differ_real_scales"],
        "real": record["verify_predictions_differ_real_scales"],
    }  # fmt: skip
    return {key: str(value) for key, value in values.items()}


def name(record: dict) -> str:
    """Returns what a row is called."""
    return f"{record['model']} {record['quant']} W{record['layer_wbit']}A{record['layer_abit']}"


def taken(study: Path) -> list[str]:
    """Returns a line for each package and ONNX file."""
    lines = []
    for path in sorted(study.glob("*/metrics.json")):
        record = json.loads(path.read_text())
        if "package_bytes" in record:
            floats = record["weight_bytes_float"]
            lines.append(
                f"* {name(record)}, package: weights {record['package_bytes']:,} bytes (float {floats:,}); compiled C: "
                f"{record['package_c'] or 'not tried'}"
            )
        if "onnx_bytes" in record:
            lines.append(
                f"* {name(record)}, ONNX: {record['onnx_bytes']:,} bytes; {record['onnx_predictions_differ']} of "
                f"{record['verify_images']:,} predictions differ from the integers'"
            )
    return lines


def accumulators(study: Path) -> tuple[list[str], str]:
    """Returns the tables of accuracy against the accumulator's width, and a drawing (SVG) of the first."""
    lines, drawing = [], ""
    for path in sorted(study.glob("*/accumulator.csv")):
        table = pd.read_csv(path)
        record = json.loads((path.parent / "metrics.json").read_text())
        title = f"{name(record)}, {int(table.images.iloc[0]):,} images"
        lines += [title, "", "| bits | overflow | top-1 | sums that overflow | worst layer |", "|---|---|---|---|---|"]
        lines += [
            f"| {r.bits} | {r.overflow} | {r.top1:.2f} | {r.share:.4f} % | {'' if pd.isna(r.worst_layer) else r.worst_layer} |"
            for r in table.itertuples()
        ]
        drawing = drawing or draw(table, title)
    return lines, drawing


def draw(table: pd.DataFrame, title: str) -> str:
    """Returns an SVG: top-1 against bits, one line for each kind of overflow."""
    low, high = int(table.bits.min()), int(table.bits.max())

    def place(bits: float, top1: float) -> tuple[float, float]:
        across, up = (bits - low) / max(high - low, 1), top1 / 100
        return LEFT + across * (WIDTH - LEFT - 110), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - 40)

    def text(x: float, y: float, words: object, anchor: str = "middle") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'

    parts = [text(LEFT, 20, f"Top-1 (%) against accumulator width: {title}", "start")]
    for top1 in range(0, 101, 20):
        (x0, y), (x1, _) = place(low, top1), place(high, top1)
        parts += [f'<path d="M{x0:.0f} {y:.1f}H{x1:.0f}" stroke="#d5d5d5"/>', text(x0 - 8, y + 4, top1, "end")]
    parts += [text(place(bits, 0)[0], HEIGHT - 20, bits) for bits in sorted(set(table.bits))]
    parts.append(text(place((low + high) / 2, 0)[0], HEIGHT - 3, "bits of the accumulator, sign included"))
    for i, (overflow, rows) in enumerate(table.sort_values("bits").groupby("overflow")):
        color, dash = LINES[str(overflow)]
        points = [place(r.bits, r.top1) for r in rows.itertuples()]
        parts.append(polyline(points, f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        parts.append(f'<g fill="{color}">{text(WIDTH - 100, 80 + 20 * i, overflow, "start")}</g>')
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>\n{body}\n</svg>\n'


def polyline(points: Iterable[tuple[float, float]], style: str) -> str:
    """Returns a line through points."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {style}/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's folder, such as runs/integers")
    parser.add_argument("--accumulators", type=Path, help="a study whose runs have an accumulator.csv")
    args = parser.parse_args()
    print("\n".join([*proofs(args.study), "", *taken(args.study)]))
    if args.accumulators:
        lines, drawing = accumulators(args.accumulators)
        print("\n" + "\n".join(lines))
        if drawing:
            (Path(__file__).parent / "accumulator.svg").write_text(drawing)


if __name__ == "__main__":
    main()
