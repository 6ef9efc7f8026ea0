"""`run.py` with a clock: `python -m experiments.sweep_cost.timed [-m] OVERRIDES` writes the seconds of each phase as JSON to $QEXP_TIMES.

After points of a sweep it evaluates the float network (after every third point) and a torch.ao network (at three equal widths), so that
whatever else the machine does falls on all alike; those seconds are counted apart.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from qexp.command.root import register
from qexp.run.settings import Settings

register()
ROOT = Path(__file__).resolve().parents[2]
SECONDS: dict[str, list[float]] = {}


def since_start() -> float:
    """Returns the seconds since this process was started, by the system's clock."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def note(name: str, seconds: float) -> None:
    """Adds a measurement."""
    SECONDS.setdefault(name, []).append(seconds)


def compare(settings: Settings, number: int) -> None:
    """Times an evaluation of the float network with folded batch norms and, where both widths are equal, a torch.ao network."""
    from experiments.sweep_cost import observers
    from qexp.network.facts import facts
    from qexp.passes.fold_bn import fold_bn
    from qexp.run import float_network, training
    from qexp.run.datasets import load_data

    start = time.perf_counter()
    data = load_data(settings.data.module)
    model = float_network.float_model(settings, data)
    if number % 3 == 0:
        folded = copy.deepcopy(model).eval()
        fold_bn(folded, facts(folded, data.example()))
        folded = folded.to(memory_format=torch.channels_last)
        note("float", training.evaluate(folded, data, settings, "float", settings.runs_dir)[1])
    wbit, abit = settings.widths.weights, settings.widths.inputs
    if wbit == abit and wbit in (2, 4, 8):
        images = data.calibration_batches(settings.n_calibrate, 32, settings.seed)
        calibrate, evaluate, _ = observers.point(model, data, images, wbit, abit)
        note("ao_calibrate", calibrate)
        note("ao_evaluate", evaluate)
    note("aside", time.perf_counter() - start)


def timed(name: str, function):
    """Returns the function, its seconds noted at every call."""

    def call(*args, **options):
        start = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            note(name, time.perf_counter() - start)

    return call


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> dict:
    from qexp.run import float_network, pipeline
    from qexp.run.settings import read
    from qexp.system.allocator import settle

    settle()
    if not SECONDS:
        note("startup", since_start())
        pipeline.load_data = timed("data", pipeline.load_data)
        pipeline.find_ranges = timed("ranges", pipeline.find_ranges)
        float_network.reference = timed("reference", float_network.reference)
    settings = read(cfg, in_sweep=True)
    metrics = pipeline.run(settings)
    note("evaluate", metrics["seconds_evaluate"])
    note("points", 1)
    if cfg.study == "sweep_cost":
        compare(settings, len(SECONDS["points"]) - 1)
    return metrics


if __name__ == "__main__":
    try:
        main()
    finally:
        note("total", since_start())
        Path(os.environ["QEXP_TIMES"]).write_text(json.dumps(SECONDS))
        sys.stdout.flush()
