"""Why accuracy collapsed: the likely cause, the layers, and what to try, in words."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qexp.report.wording import metric_name

_COLLAPSE = 0.5  # a network that keeps less than half of its float accuracy has collapsed
_POOR_SQNR = 6.0  # dB: the error is half the signal
_MUCH_SATURATION = 5.0  # percent


def diagnose(row: dict[str, Any], layers: pd.DataFrame) -> list[str]:
    """Returns findings for a point that collapsed, most telling first; an empty list where it did not.

    Args:
        row: The point's metrics: value and value_float in percent, layer_abit and the rest.
        layers: The point's `layers.csv`.
    """
    value, base = row.get("value"), row.get("value_float")
    if value is None or base is None or value >= _COLLAPSE * base:
        return []
    findings = [f"{metric_name(row.get('metric', 'accuracy'))} fell from {base:.1f} % to {value:.1f} %"]
    table = layers[layers.quantizer != "float"].copy()
    if table.empty:
        return findings
    for name in ("sqnr", "saturation", "levels_used", "levels"):
        table[name] = pd.to_numeric(table[name], errors="coerce")
    poor = table[table.sqnr < _POOR_SQNR].sort_values("sqnr")
    if len(poor):
        findings.append(
            f"error nearly as large as the signal (SQNR below {_POOR_SQNR:.0f} dB) in {len(poor)} tensors: "
            f"{_list(poor, 'sqnr', ' dB')}; try more bits there, quant=mse, or QAT"
        )
    clipped = table[table.saturation > _MUCH_SATURATION].sort_values("saturation", ascending=False)
    if len(clipped):
        findings.append(
            f"many values beyond the range in {len(clipped)} tensors: {_list(clipped, 'saturation', ' %')}; "
            "try quant=minmax or a higher percentile"
        )
    dead = table[(table.levels_used < 0.5 * table.levels) & (table.levels <= 256)].sort_values("levels_used")
    if len(dead):
        findings.append(
            f"fewer than half of the levels are used in {len(dead)} tensors: {_list(dead, 'levels_used', ' levels')}; "
            "outliers set the range: try quant=mse or percentile"
        )
    return findings


def _list(table: pd.DataFrame, column: str, unit: str) -> str:
    parts = [f"{r.layer} {r.site} ({getattr(r, column):.3g}{unit})" for r in table.head(3).itertuples()]
    return ", ".join(parts) + (" ..." if len(table) > 3 else "")
