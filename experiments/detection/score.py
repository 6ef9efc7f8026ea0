"""Scores a finished run's network on another data set: `python -m experiments.detection.score RUN_FOLDER GROUP=CHOICE ...`."""

from __future__ import annotations

import sys

import torch

import qexp
from qexp.command.compose import settings_of
from qexp.run import training
from qexp.run.datasets import load_data


@torch.no_grad()
def main() -> None:
    """Prints the score with its interval and the number of images."""
    folder, *words = sys.argv[1:]
    settings = settings_of(words)
    data = load_data(settings.data.module)
    network = qexp.load(folder).eval()
    task = training.task(settings, network)
    score = task.score_of([task.evidence(network(images), targets) for images, targets in data.test_dataloader()])
    print(f"{task.label} {100 * score.value:.2f} % [{100 * score.low:.2f}, {100 * score.high:.2f}] on {score.n} images")


if __name__ == "__main__":
    main()
