"""A metric's kind (share or not, direction, unit), and how its numbers are stored and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexp.results import wording

_LABELS = {"top1": "top-1", "map_voc07": "mAP", "lfw_accuracy": "LFW"}  # labels for records without a label


@dataclass(frozen=True)
class Measure:
    """The kind of a point's numbers; by default a share in percent, where more is better.

    Attributes:
        metric: Column name: `top1`, `miou`, `psnr`.
        label: A short name for people.
        unit: `%` for a share; for others their own (`dB`), empty for none.
        is_share: Whether the metric is a share in 0..1, stored in percent.
        higher_is_better: Whether more is better.
    """

    metric: str = "accuracy"
    label: str = ""
    unit: str = "%"
    is_share: bool = True
    higher_is_better: bool = True

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Measure:
        """Returns the measure of a point's record, or of a row of a table."""
        metric = row.get("metric")
        metric = "accuracy" if metric is None or metric != metric else str(metric)
        label, unit = (value if isinstance(value := row.get(key), str) else None for key in ("metric_label", "unit"))
        is_share, higher = (_boolean(row.get(key)) for key in ("is_share", "higher_is_better"))
        return cls(metric, label or _LABELS.get(metric, metric), "%" if is_share else unit or "", is_share, higher)

    def columns(self) -> dict[str, Any]:
        """Returns the columns of a record that describe its numbers."""
        return {
            "metric": self.metric,
            "metric_label": self.label,
            "unit": self.unit,
            "is_share": self.is_share,
            "higher_is_better": self.higher_is_better,
        }

    @property
    def head(self) -> str:
        """The heading of a column of such numbers: `top-1 %`, `PSNR dB`."""
        return f"{self.label or self.metric} {self.unit}".rstrip()

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is: multiplied by this, a number is greater for a better network."""
        return 1 if self.higher_is_better else -1

    def stored(self, value: float) -> float:
        """Returns a score in the form of records: a share in percent, any other as it is."""
        return 100 * value if self.is_share else value

    def number(self, value: float) -> str:
        """Returns a stored number without its unit; small ones that are not percentages keep three digits."""
        if not self.is_share and 0 < abs(value) < 1:
            return wording.number(value, 3)
        return f"{value:.2f}"

    def text(self, value: float) -> str:
        """Returns a stored number with its unit: `97.20 %`, `21.30 dB`."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def distance(self, value: float) -> str:
        """Returns the distance of two stored numbers, without a sign: `0.40 points`, `1.20 dB`."""
        return f"{self.number(abs(value))} {'points' if self.is_share else self.unit}".rstrip()

    def lost(self, value: float, reference: float) -> float:
        """Returns how much worse a stored number is than another; negative where it is better."""
        return self.sign * (reference - value)

    def has_collapsed(self, value: float, reference: float) -> bool:
        """Whether less than half of a score is left: half the share or half the number; for errors, twice as many.

        For numbers at or below zero (decibels may be) the result is False.
        """
        if self.is_share:
            kept, base = (value, reference) if self.higher_is_better else (100 - value, 100 - reference)
            return kept < base / 2
        if reference <= 0:
            return False
        return value < reference / 2 if self.higher_is_better else value > 2 * reference


def _boolean(value: Any) -> bool:
    """Returns a flag of a record: true unless it is clearly false."""
    return not (isinstance(value, bool | np.bool_) and not value) and str(value).lower() != "false"


def is_possible_share(value: float) -> bool:
    """Returns whether a number can be a share in 0..1; an unknown one (NaN) can."""
    return math.isnan(value) or -1e-9 <= value <= 1 + 1e-9
