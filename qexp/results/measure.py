"""What a task's metric is: a share or not, better upwards or downwards, its unit; and how its numbers are stored and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexp.results import wording

_LABELS = {"top1": "top-1", "map_voc07": "mAP", "lfw_accuracy": "LFW"}  # of records that name none


@dataclass(frozen=True)
class Measure:
    """What the numbers of a point are; a record that does not say holds a share in percent, better upwards.

    Attributes:
        metric: Column name: `top1`, `miou`, `psnr`.
        label: What people call it, where room is short.
        unit: `%` of a share; of others their own (`dB`), empty for none.
        is_share: Whether it is a share in 0..1, stored in percent.
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
        """Returns the columns of a record that say what its numbers are."""
        return {
            "metric": self.metric,
            "metric_label": self.label,
            "unit": self.unit,
            "is_share": self.is_share,
            "higher_is_better": self.higher_is_better,
        }

    @property
    def head(self) -> str:
        """What a column of such numbers is called: `top-1 %`, `PSNR dB`."""
        return f"{self.label or self.metric} {self.unit}".rstrip()

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is: a number times this is greater for a better network."""
        return 1 if self.higher_is_better else -1

    def stored(self, value: float) -> float:
        """Returns a score as records hold it: a share in percent, everything else as it is."""
        return 100 * value if self.is_share else value

    def number(self, value: float) -> str:
        """Returns a stored number without its unit; small ones that are no percentages keep three digits."""
        if not self.is_share and 0 < abs(value) < 1:
            return wording.number(value, 3)
        return f"{value:.2f}"

    def text(self, value: float) -> str:
        """Returns a stored number with its unit: `97.20 %`, `21.30 dB`."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def distance(self, value: float) -> str:
        """Returns how far two stored numbers lie apart, without a sign: `0.40 points`, `1.20 dB`."""
        return f"{self.number(abs(value))} {'points' if self.is_share else self.unit}".rstrip()

    def lost(self, value: float, reference: float) -> float:
        """Returns how much worse a stored number is than another; negative where it is better."""
        return self.sign * (reference - value)

    def has_collapsed(self, value: float, reference: float) -> bool:
        """Whether less than half of a score is left: half the share, half the number; of errors, twice as many.

        Of numbers at or below zero (decibels may be) nobody can say so.
        """
        if self.is_share:
            kept, base = (value, reference) if self.higher_is_better else (100 - value, 100 - reference)
            return kept < base / 2
        if reference <= 0:
            return False
        return value < reference / 2 if self.higher_is_better else value > 2 * reference


def _boolean(value: Any) -> bool:
    """Returns a flag of a record: true unless it clearly says false."""
    return not (isinstance(value, bool | np.bool_) and not value) and str(value).lower() != "false"


def is_possible_share(value: float) -> bool:
    """Whether a number can be a share in 0..1; one that is not known (NaN) can."""
    return math.isnan(value) or -1e-9 <= value <= 1 + 1e-9
