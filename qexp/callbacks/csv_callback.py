"""A table that grows while a network trains."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning import Callback, LightningModule, Trainer


class CsvCallback(Callback):
    """Appends rows that begin with step and epoch to a CSV file; a resumed training drops the rows after its step.

    Attributes:
        file: Name of the file, in the run folder.
        columns: Names of the columns after step and epoch.
        path: The file; the pipeline sets it; without it nothing is written.
        epochs_before, steps_before: Epochs and steps of the trainings that this one continues.
    """

    file: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path else None
        self.epochs_before = self.steps_before = 0

    def writes(self, trainer: Trainer) -> bool:
        """Returns whether this process writes the file."""
        return self.path is not None and trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.writes(trainer):
            return
        rows = self._kept(self.steps_before + trainer.global_step)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", *self.columns])
            writer.writerows(rows)

    def _kept(self, step: int) -> list[list[str]]:
        """Returns the rows of an earlier, interrupted run up to the step it resumes from."""
        if step == 0 or not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        return [row for row in rows if len(row) == 2 + len(self.columns) and int(row[0]) <= step]

    def append(self, trainer: Trainer, rows: Iterable[Iterable[Any]]) -> None:
        """Adds rows at the present step and epoch; numbers get six digits."""
        at = [self.steps_before + trainer.global_step, self.epochs_before + trainer.current_epoch]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([*at, *(_short(v) for v in row)] for row in rows)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
