"""Run folders as the pipeline writes them, with believable numbers and nothing measured."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qexp.results.confidence import wilson

FLOAT = 91.73
LAYERS = [
    "conv1",
    *(
        f"layer{s}.{b}.{part}"
        for s in (1, 2, 3)
        for b in (0, 1, 2)
        for part in ("conv1", "conv2", *(["shortcut"] if s > 1 and b == 0 else []))
    ),
    "linear",
]
# Points lost at 4-bit weights and inputs, and wall seconds, by method.
METHODS = {"minmax": (11.0, 6), "mse": (3.2, 7), "aciq": (4.1, 6), "lsq": (0.7, 1450), "pact": (1.3, 1390)}


@pytest.fixture
def write_point() -> Callable[..., Path]:
    """Returns a function that writes one point folder."""
    return make_point


@pytest.fixture
def write_findings() -> Callable[[Path], None]:
    """Returns a function that adds the tables of a search and of a proof to a point."""
    return add_findings


@pytest.fixture(scope="session")
def written_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the study that `study` copies: writing it takes longer than copying."""
    return make_study(tmp_path_factory.mktemp("written") / "widths", widths=(2, 4, 8))


@pytest.fixture
def study(tmp_path: Path, written_study: Path) -> Path:
    """Returns a small study: three methods, W and A of 2, 4, 8 bits, one method with three seeds, one failure."""
    return shutil.copytree(written_study, tmp_path / "runs" / "widths")


@pytest.fixture
def chromium() -> str:
    """Returns the browser, or skips the test with the reason."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine")


def make_study(folder: Path, widths: tuple[int, ...], methods: tuple[str, ...] = ("minmax", "mse", "lsq")) -> Path:
    """Returns the folder after a grid of points was written into it."""
    for method in methods:
        for w in widths:
            for a in widths:
                for seed in (0, 1, 2) if method == "lsq" and w == a else (0,):
                    make_point(folder, method, w, a, seed)
    error = "QexpError: layer1.0.conv1 input: scale is not finite (inf) in batch 3; lower the learning rate"
    make_point(folder, "pact", 2, 2, 0, status="failed", error=error, value=None, drop=None, ci_low=None, ci_high=None)
    return folder


def make_point(folder: Path, method: str, w: int, a: int, seed: int = 0, plain: bool = False, **changes: Any) -> Path:
    """Returns the folder of a new point; `changes` overwrite its metrics, `plain` leaves out all but those."""
    rng = np.random.default_rng([seed, w, a, *method.encode()])
    lost, seconds = METHODS.get(method, (5.0, 10))
    drop = min(lost * (2.0 ** (4 - w) + 2.0 ** (4 - a)) / 2, 81.0) + rng.normal(0, 0.12)
    value = round(FLOAT - drop, 2)
    low, high = wilson(round(value * 100), 10_000)
    trains = seconds > 100
    metrics = {
        **{"study": folder.name, "point": "", "status": "ok", "error": None, "model": "resnet20", "dataset": "cifar10"},
        **{"quant": method, "schedule": "qat" if trains else "ptq", "layer_wbit": w, "layer_abit": a, "mean_wbit": w},
        **{"mean_abit": a, "seed": seed, "metric": "top1", "value": value, "value_float": FLOAT, "drop": drop},
        **{"ci_low": low, "ci_high": high, "n_eval": 10_000, "params": 269_722, "macs": 40_551_040},
        **{"bops": 40_551_040 * w * a, "weight_bytes": 269_722 * w // 8, "weight_bytes_float": 269_722 * 4},
        **{"seconds_calibrate": 0.8, "seconds_train": seconds * trains, "seconds_evaluate": 4.1 + rng.random()},
        **{"device": "cpu", "kernels": "cpp", "torch": "2.11.0", "commit": "0123abc", "rounding": "half_even"},
        **{"granularity": "channel", "ends_bit": 8, "bn": "fold", "add": "float", "quantize_input": False},
        **{"n_calibrate": 512, "top5": min(99.9, value + 8), **changes},
    }
    if value < 20 and "diagnosis" not in changes:
        metrics["diagnosis"] = ["accuracy near chance (10 %)", "layer3.2.conv2 input: 41 % of the values saturate"]
    point = folder / (changes.get("point") or f"{method}-w{w}a{a}-s{seed}")
    point.mkdir(parents=True, exist_ok=True)
    (point / "metrics.json").write_text(json.dumps(metrics))
    (point / "config.yaml").write_text(f"quant: {method}\nseed: {seed}\n")
    if not plain:
        _layers(rng, w, a, method).to_csv(point / "layers.csv", index=False)
        (point / "histograms.json").write_text(json.dumps(_histograms(rng, w, a, trains)))
        (point / "depth.json").write_text(json.dumps(_depth(w, a)))
        if trains:
            _curves(rng, value).to_csv(point / "curves.csv", index=False)
            _history(w, a).to_csv(point / "history.csv", index=False)
    return point


def _layers(rng: np.random.Generator, w: int, a: int, method: str) -> pd.DataFrame:
    """Returns a plan of weights and inputs with errors that grow with depth."""
    rows = []
    for depth, layer in enumerate(LAYERS):
        ends = layer in (LAYERS[0], LAYERS[-1])
        for site, asked in (("weight", w), ("input", a)):
            bits = 8 if ends else asked
            reach = float(rng.uniform(0.5, 3))
            low, high = (-reach, reach) if site == "weight" else (0.0, 2 * reach)
            sqnr = 6.02 * bits - 4 - 0.25 * depth + rng.normal(0, 1.5)
            rows.append(
                {
                    **{"layer": layer, "site": site, "quantizer": "UniformQuantizer", "bits": bits},
                    **{
                        "granularity": "channel" if site == "weight" else "tensor",
                        "signed": site == "weight",
                        "range": method,
                    },
                    **{"rule": "ends" if ends else "default", "scale": (high - low) / (2**bits - 1), "zero_point": 0},
                    **{"levels": 2**bits, "levels_used": max(2, int(2**bits * rng.uniform(0.7, 1))), "sqnr": sqnr},
                    **{
                        "mse": 10 ** (-sqnr / 10),
                        "cosine": 1 - 10 ** (-sqnr / 10) / 2,
                        "norm1": 100 * 10 ** (-sqnr / 20),
                    },
                    **{"saturation": float(rng.exponential(0.3)), "entropy": bits * rng.uniform(0.6, 0.95)},
                    **{
                        "weights": 2304 * (1 + depth // 7),
                        "macs": 2_359_296,
                        "bops": 2_359_296 * w * a,
                        "low": low,
                        "high": high,
                    },
                }
            )
    return pd.DataFrame(rows)


def _histograms(rng: np.random.Generator, w: int, a: int, trained: bool) -> list[dict[str, Any]]:
    """Returns a bell for each weight and a folded bell for each input; untrained points share their weights."""
    fixed = rng if trained else np.random.default_rng(7)
    entries = []
    for layer in LAYERS:
        for site, bits in (("weight", w), ("input", a)):
            values = fixed.normal(0, fixed.uniform(0.1, 1), 4000)
            values = values if site == "weight" else np.abs(values)
            counts, edges = np.histogram(values, 128)
            cut = 0.8 * np.abs(values).max()
            low, high = (-cut, cut) if site == "weight" else (0.0, cut)
            entries.append(
                {
                    **{
                        "layer": layer,
                        "site": site,
                        "low_edge": float(edges[0]),
                        "bin_width": float(edges[1] - edges[0]),
                    },
                    **{
                        "counts": [int(c) * 37 for c in counts],
                        "zeros": 0 if site == "weight" else 61_000,
                        "count": 209_000,
                    },
                    **{"low": float(low), "high": float(high), "levels": list(np.linspace(low, high, 2**bits))},
                }
            )
    return entries


def _depth(w: int, a: int) -> dict[str, Any]:
    """Returns errors that add up with depth, the last layer but one the worst, and one drifted batch norm."""
    local = [5.0 * min(w, a) - 0.3 * i for i in range(len(LAYERS))]
    local[-2] -= 12
    total = [min(local[: i + 1]) - 0.2 * i for i in range(len(LAYERS))]
    layers = [{"layer": name, "local": one, "total": all_} for name, one, all_ in zip(LAYERS, local, total)]
    return {
        "layers": layers,
        "norms": [{"layer": f"bn{i}", "shift": 0.1 * i, "spread": 1.0 + 0.1 * i} for i in range(4)],
    }


def _history(w: int, a: int) -> pd.DataFrame:
    """Returns scales that grow while training, the more the deeper, and weights that oscillate at the end."""
    return pd.DataFrame(
        [
            {
                **{
                    "step": step,
                    "epoch": step // 391,
                    "layer": layer,
                    "site": site,
                    "scale": 0.1 * (1 + step * depth / 4e4),
                },
                **{
                    "low": -1.0,
                    "high": 1.0,
                    "sqnr": 5.0 * bits,
                    "saturation": 0.5,
                    "levels_used": 2**bits,
                    "levels": 2**bits,
                },
                **(
                    {"oscillating": step / 200, "frozen": 0.0}
                    if site == "weight"
                    else {"oscillating": None, "frozen": None}
                ),
            }
            for step in range(0, 2001, 250)
            for depth, layer in enumerate(LAYERS)
            for site, bits in (("weight", w), ("input", a))
        ]
    )


def _curves(rng: np.random.Generator, value: float) -> pd.DataFrame:
    """Returns loss, accuracy and learning rate of 2,000 steps in long format."""
    rows = []
    for step in range(0, 2000, 5):
        gone = step / 2000
        noise = rng.normal(0, 0.03)
        loss = 2.2 * math.exp(-5 * gone) + 0.12 + noise * (1 - gone / 2)
        rows += [
            (step, step // 391, "train_loss", loss),
            (step, step // 391, "lr", 0.01 * (1 + math.cos(math.pi * gone))),
        ]
        if step % 100 == 95:
            top1 = value - 20 * math.exp(-5 * gone) + 10 * noise
            rows += [(step, step // 391, "val_top1", top1), (step, step // 391, "train_top1", top1 + 3)]
    return pd.DataFrame(rows, columns=["step", "epoch", "name", "value"])


def add_findings(point: Path) -> None:
    """Writes what a search and a proof of integers leave in a run folder."""
    bits = (2, 4, 8)
    rows = [
        {"layer": layer, "site": site, "bits": b, "divergence": (1 + i) / 4**b, "drop": 10 / b}
        for i, layer in enumerate(LAYERS[1:-1])
        for site in ("weight", "input")
        for b in bits
    ]
    pd.DataFrame(rows).to_csv(point / "sensitivity.csv", index=False)
    trials = [
        {"trial": i, "agree": 90 + i % 9, "weight_bytes": 5e4 + 1e3 * i, "bops": 1e8 + 1e7 * i, "front": i < 9}
        for i in range(40)
    ]
    pd.DataFrame(trials).to_csv(point / "pareto.csv", index=False)
    kinds = [
        {"bits": b, "overflow": kind, "images": 100, "value": min(90, (4 + (kind == "wrap")) * b), "share": 30 / b}
        for b in (12, 16, 20, 24)
        for kind in ("saturate", "wrap")
    ]
    pd.DataFrame(kinds).to_csv(point / "accumulator.csv", index=False)
