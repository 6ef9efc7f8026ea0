"""Numbers in a form for people: bytes, counts, durations, bit widths."""

import math
import re
from collections.abc import Mapping
from typing import Any

PLAN = "plan"  # value of `layer_wbit` and `layer_abit` where a plan sets the widths


def reference(row: Mapping[str, Any]) -> str:
    """Returns the name of a point's reference: the float network, or quantized training's weights evaluated in float."""
    known = row.get("reference")
    return "float" if not isinstance(known, str) or not known else known


def is_number(value: Any) -> bool:
    """Returns whether the value is a finite number (text that looks like one counts)."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def number(value: float, digits: int = 3) -> str:
    """Returns the number with that many significant digits and no exponent, `'-'` for none."""
    if not is_number(value):
        return "-"
    value = float(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{min(decimals, 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: float) -> str:
    """Returns a duration such as `0.42 s`, `12 s`, `3 min 05 s`, `2 h 14 min`."""
    if not is_number(value):
        return "-"
    value = float(value)
    if value < 10:
        return f"{number(value, 2)} s"
    if value < 100:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def bits(spec: Any, mean: Any) -> str:
    """Returns `4` for one width, `~4.3` (the mean over weights) for a width per group, and any other value as it was given."""
    if is_number(spec):
        return number(spec)
    if is_number(mean):
        return f"~{number(mean, 2 if float(mean) < 10 else 3)}"
    if spec is None or spec != spec:
        return "?"
    text = " ".join(str(spec).split())
    return "mixed" if text.startswith(("[", "{")) else text if len(text) <= 20 else f"{text[:19]}…"


# The columns that `width` reads.
WIDTHS = ("layer_wbit", "layer_abit", "mean_wbit", "mean_abit", "plan", "quant", "quantized_macs")


def width(row: Mapping[str, Any]) -> str:
    """Returns the widths of a point in the form `W4A8`; for a run with a plan that failed before its bits were known, the plan."""
    if row.get("layer_wbit") == PLAN and not is_number(row.get("mean_wbit")):
        return asked(row)
    own = (row.get("layer_wbit"), row.get("layer_abit"))
    if re.search(
        r"\+ (allocate|pareto)\b", str(row.get("quant"))
    ):  # the widths that were asked for are the budget, not the plan
        own = tuple(None if is_number(row.get(mean)) else given for given, mean in zip(own, ("mean_wbit", "mean_abit")))
    w, a = bits(own[0], row.get("mean_wbit")), bits(own[1], row.get("mean_abit"))
    share = partly(row)
    return f"W{w}A{a} on {share}" if share else f"W{w}A{a}"


def partly(row: Mapping[str, Any]) -> str:
    """Returns the share of products that a point quantizes, `""` where that is all of them or unknown."""
    share = row.get("quantized_macs")
    return percent(share) if is_number(share) and float(share) < 100 else ""


def percent(share: float) -> str:
    """Returns a share in percent, rounded down so that only everything is `100 %`: `97 %`, `99.95 %`.

    >>> percent(40.66), percent(99.957), percent(100), percent(0.2)
    ('40 %', '99.95 %', '100 %', '0.2 %')
    """
    digits = 2 if share > 99 or share < 1 else 0
    return f"{number(math.floor(share * 10**digits) / 10**digits, 6)} %"


def asked(row: Mapping[str, Any]) -> str:
    """Returns the requested widths: `W4A8`, `W[8,4]A8`, `plan x.csv@3fa2b1`."""
    if row.get("layer_wbit") == PLAN:
        return f"plan {row.get('plan')}"
    return f"W{row.get('layer_wbit')}A{row.get('layer_abit')}"


def verdict(row: Mapping[str, Any]) -> str:
    """Returns the recorded proof of a point in one line; `""` for a point without one."""
    if not row.get("verify"):
        return ""
    exact, real = (
        "" if (count := row.get(f"verify_predictions_differ{end}")) is None else f", {count} predictions"
        for end in ("", "_real_scales")
    )
    return (
        f"integers against simulation, {row.get('verify_images')} images: {str(row['verify']).upper()} "
        f"({row.get('verify_codes_differ')} codes differ with integer rounding{exact}); "
        f"against real scales {row.get('verify_codes_differ_real_scales') or 0:.4f} % of codes differ{real}"
    )
