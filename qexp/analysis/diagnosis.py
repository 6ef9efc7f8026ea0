"""Explains a collapse of accuracy in words: the likely causes, the layers, and what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qexp.results.measure import Measure

_NUMBERS = (
    *("sqnr", "saturation", "sqnr_float", "saturation_float", "sqnr_channel", "channel_spread"),
    *("levels_used", "levels", "bits"),
)
_USUAL = 5.0  # SQNR in dB per bit that weights or activations have with a suitable range
_BROKEN = 6.0  # dB below the usual: the width alone does not explain this tensor's error
_POOR_SQNR = 6.0  # dB: the error is half the signal
_MUCH_SATURATION = 5.0  # percent
_UNEVEN = 4.0  # greatest over median channel; below it, one scale per channel gains less than 2 bits
_OSCILLATING = 10.0  # percent of a layer's weights
_RUNAWAY = 8.0  # factor by which training moved a scale
_DRIFT = 0.5  # standard deviations
_GAP = 20.0  # points between training and evaluation


@dataclass(frozen=True)
class Finding:
    """A likely cause: its cost in dB at the worst tensor, and its description."""

    cost: float
    text: str


def diagnose(
    row: dict[str, Any],
    layers: pd.DataFrame,
    depth: Sequence[dict[str, Any]] = (),
    norms: Sequence[dict[str, Any]] = (),
    history: pd.DataFrame | None = None,
) -> list[str]:
    """Returns the findings for a collapsed point: its loss of accuracy, then the likely causes, costliest first; else an empty list.

    Args:
        row: The point's metrics; includes value and value_float, and their description (see `Measure`).
        layers: The point's `layers.csv`.
        depth: Error by layer, `{layer, local, total}`, as `calibration.depth.errors_by_depth` gives it.
        norms: Drift of batch norms, `{layer, shift, spread}`, as `calibration.depth.norm_drift` gives it.
        history: The point's `history.csv`, if it was trained with quantizers.
    """
    value, base = row.get("value"), row.get("value_float")
    measure = Measure.of(row)
    if base is None or (value is not None and not math.isnan(value) and not measure.has_collapsed(value, base)):
        return []
    if value is None or math.isnan(value):
        return [f"{measure.label} is not a number"]
    numbers = [f"{x:.1f} %" if measure.is_share else measure.text(x) for x in (base, value)]
    fell = f"{measure.label} {'fell' if value < base else 'rose'} from {numbers[0]} to {numbers[1]}"
    table = layers[layers.quantizer != "float"].copy()
    for column in _NUMBERS:
        table[column] = pd.to_numeric(table[column], errors="coerce") if column in table else math.nan
    # A broken layer spoils all later inputs, so an input counts as broken only if it is also broken on float activations.
    table["sqnr"] = table[["sqnr", "sqnr_float"]].max(axis=1)
    table["saturation"] = table[["saturation", "saturation_float"]].min(axis=1)
    # Where a few channels hold most of the power, the error of the other channels counts.
    table["uneven"] = (table.channel_spread > _UNEVEN) & (table.granularity == "tensor")
    told = table.sqnr.where(~table.uneven, table[["sqnr", "sqnr_channel"]].min(axis=1))
    table["deficit"] = _USUAL * table.bits - told
    found = [*_tensors(table), _drift(norms), *_training(table, history), _gap(row)]
    ranked = sorted((f for f in found if f is not None), key=lambda f: -f.cost)
    return [fell, *([f.text for f in ranked] or _narrow(table)), *_where(depth)]


def _tensors(table: pd.DataFrame) -> list[Finding | None]:
    """Returns findings for tensors whose error is larger than their width explains; if there are none, the narrow tensors."""
    broken = table[table.deficit > _BROKEN].sort_values("deficit", ascending=False)
    torn = broken.uneven & (broken.channel_spread > 2 * _UNEVEN)
    clipped = ~torn & (broken.saturation > _MUCH_SATURATION)
    dead = ~torn & ~clipped & (broken.levels_used < 0.5 * broken.levels)
    uneven = broken.uneven & ~clipped & ~dead
    rest = broken[~uneven & ~clipped & ~dead]
    causes = [
        _finding(
            broken[uneven],
            "channel_spread",
            "x the median",
            "one scale serves channels of very different size, so that most of them lose their levels",
            "try one scale per channel (quant.weight.granularity=channel), passes=[equalize], or more bits there",
        ),
        _finding(
            broken[clipped],
            "saturation",
            " % beyond",
            "the range cuts off many values",
            "try quant=minmax or a higher percentile, or for learned ranges a start from calibration and a lower "
            "schedule.quantizer.lr",
        ),
        _finding(
            broken[dead],
            "levels_used",
            " levels used",
            "a few outliers set the range, and most levels are unused",
            "try quant=mse or quant=percentile",
        ),
        _finding(
            rest, "sqnr", " dB", "the error is larger than the width explains", "try quant=mse, or more bits there"
        ),
    ]
    return causes


def _narrow(table: pd.DataFrame) -> list[str]:
    """Returns the finding that the widths alone are the cause."""
    narrow = table[table.sqnr.notna() & (table.bits < 8)].sort_values("sqnr")
    if narrow.empty:
        return []
    return [
        f"too few bits: no single tensor is the cause, the errors of narrow ones add up, in {_list(narrow, 'sqnr', ' dB')}; "
        f"try schedule=qat, or more bits there{_rule(narrow)}"
    ]


def _finding(table: pd.DataFrame, column: str, unit: str, cause: str, remedy: str) -> Finding | None:
    if table.empty:
        return None
    return Finding(float(table.deficit.max()), f"{cause}, in {_list(table, column, unit)}; {remedy}{_rule(table)}")


def _rule(table: pd.DataFrame) -> str:
    """Returns the override that sets 8 bits for the worst tensor."""
    worst = table.iloc[0]
    return f' (quant.rules.wide={{layers: "{worst.layer}", {worst.site}: {{bits: 8}}}})' if worst.bits < 8 else ""


def _drift(norms: Sequence[dict[str, Any]]) -> Finding | None:
    """Returns a finding on batch norms whose running statistics do not match their quantized inputs."""
    bad = [n for n in norms if n["shift"] > _DRIFT or n["spread"] > 1 + _DRIFT]
    if not bad:
        return None

    def error(norm: dict[str, Any]) -> float:
        return norm["shift"] ** 2 + math.log(norm["spread"]) ** 2

    worst = sorted(bad, key=error, reverse=True)
    named = [
        f"{n['layer']} (means off by {n['shift']:.2g} deviations, deviations by {n['spread']:.2g}x)" for n in worst[:3]
    ]
    return Finding(
        2 * _USUAL + 10 * math.log10(error(worst[0])),
        f"running statistics of {_count(len(bad), 'batch norm')} do not match their inputs in the quantized network: "
        f"{', '.join(named)}{' ...' if len(bad) > 3 else ''}; try re-estimating them after quantization, bn=fold, or a lower learning "
        "rate at the end of training",
    )


def _training(table: pd.DataFrame, history: pd.DataFrame | None) -> list[Finding | None]:
    """Returns findings on training: scales that moved too far, weights that oscillate until the end."""
    if history is None or history.empty:
        return []
    names = ["layer", "site"]
    first, last = (getattr(history.groupby(names, sort=False), end)().reset_index() for end in ("first", "last"))
    moved = first.merge(last, on=names, suffixes=("_first", "_last")).merge(table[[*names, "deficit"]], on=names)
    ratio = moved.scale_last / moved.scale_first
    moved["factor"] = ratio.where(ratio >= 1, 1 / ratio)
    ran = moved[moved.factor > _RUNAWAY].sort_values("factor", ascending=False)
    found: list[Finding | None] = []
    if len(ran):
        found.append(
            Finding(
                20 * math.log10(min(float(ran.factor.max()), 1e6)),
                f"training moved the scale far from where it started, in {_list(ran, 'factor', 'x')}; "
                "try a lower schedule.quantizer.lr, or schedule.gradient_clip=1",
            )
        )
    restless = last[pd.to_numeric(last.oscillating, errors="coerce") > _OSCILLATING]
    restless = restless.sort_values("oscillating", ascending=False)
    if len(restless):
        found.append(
            Finding(
                float(restless.oscillating.max()) / 10,
                f"weights oscillate between two levels, in {_list(restless, 'oscillating', ' % of the weights')}; "
                "try schedule.oscillation.freeze=[0.04,0.01], schedule.ema=0.999, or a lower learning rate at the end",
            )
        )
    return found


def _gap(row: dict[str, Any]) -> Finding | None:
    """Returns a finding if the network is good only in training mode."""
    trained, measure = row.get("train_value"), Measure.of(row)
    # the threshold is in percent points, so it fits only such measures; and only some tasks score their training images
    if trained is None or not measure.is_share or not measure.lost(row["value"], trained) >= _GAP:
        return None
    return Finding(
        15.0,
        f"the same network reaches {trained:.1f} % in training mode: either the batch norms' running statistics do not fit, or "
        "the network has overfitted the training images; try bn=freeze, a lower learning rate at the end, or fewer epochs",
    )


def _where(depth: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the layers that cause most of the error, and the first layer at which the error exceeds half of the signal."""
    known = [d for d in depth if d["local"] is not None]
    if not known:
        return []
    worst = sorted(known, key=lambda d: d["local"])[:3]
    lost = next((d for d in depth if d["total"] is not None and d["total"] < _POOR_SQNR), None)
    made = ", ".join(f"{d['layer']} ({d['local']:.3g} dB)" for d in worst)
    text = f"by depth: most of the error arises in {made}"
    if lost is not None:
        text += f"; the accumulated error first exceeds half of the signal at {lost['layer']} ({lost['total']:.3g} dB)"
    return [text]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _list(table: pd.DataFrame, column: str, unit: str) -> str:
    parts = [f"{r.layer} {r.site} ({getattr(r, column):.3g}{unit})" for r in table.head(3).itertuples()]
    return f"{_count(len(table), 'tensor')}: " + ", ".join(parts) + (" ..." if len(table) > 3 else "")
