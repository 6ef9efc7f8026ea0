"""Writes a study of many points in the form in which runs leave them: `python -m experiments.large_study.make FROM TO --points 10000`.

FROM is a study that runs have made. Each new point is a copy of one of its points, with another method name, widths, seed, number of
calibration images, score and right answers; the scores are drawn at random around those of its template. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from qexp.results.confidence import wilson

METHODS = ("minmax", "mse", "aciq", "kl", "percentile", "lsq", "pact", "dorefa", "apot", "tqt")
CALIBRATION = (64, 128, 200, 512)
LINKED = ("histograms.json", "layers.csv", "depth.json", "config.yaml", "environment.json", "statistics.csv", "log.txt")


def choices(points: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Yields method, widths, calibration images and seed of each point; seeds repeat last."""
    grid = list(product(CALIBRATION, METHODS, range(1, 9), range(1, 9)))
    for number in range(points):
        images, method, wbit, abit = grid[number % len(grid)]
        yield method, wbit, abit, images, number // len(grid)


def make(source: Path, target: Path, points: int) -> None:
    """Writes the points; files that are equal to a template's are links to one copy."""
    templates = sorted(path.parent for path in source.glob("*/metrics.json"))
    rows = [json.loads((folder / "metrics.json").read_text()) for folder in templates]
    random = np.random.default_rng(0)
    target.mkdir(parents=True)
    for number, (method, wbit, abit, images, seed) in enumerate(choices(points)):
        folder, template, row = target / f"{number:012x}", templates[number % len(rows)], rows[number % len(rows)]
        folder.mkdir()
        for name in LINKED:
            if (template / name).is_file():
                os.link(template / name, folder / name)
        n = row["n_eval"]
        right = random.random(n) < max(0.1, row["value"] / 100 - 0.4 / 2 ** min(wbit, abit))
        low, high = wilson(int(right.sum()), n)
        value = 100 * float(right.mean())
        np.save(folder / "correct.npy", right)
        asked = {"study": target.name, "quant": method, "layer_wbit": wbit, "layer_abit": abit, "seed": seed}
        score = {"value": value, "drop": row["value_float"] - value, "ci_low": low, "ci_high": high}
        own = {"point": folder.name, "mean_wbit": float(wbit), "mean_abit": float(abit), "n_calibrate": images}
        text = json.dumps(row | asked | score | own | {"request": folder.name}, indent=1)
        (folder / "metrics.json").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("target", type=Path, metavar="TO")
    parser.add_argument("--points", type=int, default=10_000)
    args = parser.parse_args()
    make(args.source, args.target, args.points)


if __name__ == "__main__":
    main()
