"""The best widths under a budget, as an integer programme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import LinearConstraint, milp

from qexp.errors import QexpError
from qexp.network.cost import LayerCost
from qexp.numerics.widths import FLOAT
from qexp.search.budget import Option, least, share
from qexp.search.quantizers_by_width import Key

_SECONDS = 60  # HiGHS solves these small programmes in well under one second


def assign(
    table: pd.DataFrame,
    fixed: Mapping[Key, int],
    layers: Mapping[str, LayerCost],
    limits: Mapping[str, float],
) -> dict[Key, int]:
    """Returns the widths of least summed divergence within all limits.

    There is one binary variable per layer and pair of weight and input bits; every layer takes one pair. Divergences add up, which is
    right to first order. More bits never count as worse, despite noise in the measurement.

    Args:
        table: Sensitivities, rows (layer, site, bits, divergence) of the tensors to choose for.
        fixed: Widths of the other tensors of weighted layers, 32 for float.
        layers: Cost of each weighted layer.
        limits: Bounds by kind (see `budget.KINDS`).

    Raises:
        QexpError: No choice meets a limit; the message gives the least possible cost.
    """
    worth = monotone(table)
    options = [_options(name, worth, fixed) for name in layers]
    for kind, bound in limits.items():
        low = least(kind, options, layers)
        if low > bound * (1 + 1e-9):
            raise QexpError(
                f"search.budget.{kind}={bound:.6g}: the narrowest widths to choose from already cost {low:.6g}; "
                "allow narrower ones (search.widths) or more"
            )
    flat = [o for choices in options for o in choices]
    score = np.array(
        [worth.get((o.layer, "weight", o.wbit), 0.0) + worth.get((o.layer, "input", o.abit), 0.0) for o in flat]
    )
    one_each = np.zeros((len(options), len(flat)))
    start = 0
    for i, choices in enumerate(options):
        one_each[i, start : start + len(choices)] = 1
        start += len(choices)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for kind, bound in limits.items():
        # in units of the bound: HiGHS' tolerance is absolute, and bit operations run into billions
        row = np.array([share(kind, o, layers) / bound for o in flat])
        constraints.append(LinearConstraint(row[None], -np.inf, 1 + 1e-9))
    found = milp(
        score / max(score.max(), 1e-30),
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=(0, 1),
        options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise QexpError(f"search: no choice of widths meets all of {', '.join(limits)} together ({found.message})")
    chosen = [o for o, x in zip(flat, found.x) if x > 0.5]
    return {
        key: bits
        for o in chosen
        for key, bits in (((o.layer, "weight"), o.wbit), ((o.layer, "input"), o.abit))
        if (*key, bits) in worth
    }


def monotone(table: pd.DataFrame) -> dict[tuple[str, str, int], float]:
    """Returns the divergences by (layer, site, bits), each at least that of the next wider one."""
    out = {}
    for (layer, site), rows in table.groupby(["layer", "site"], sort=False):
        worst = 0.0
        for row in rows.sort_values("bits", ascending=False).itertuples():
            worst = max(worst, float(row.divergence))
            out[layer, site, int(row.bits)] = worst
    return out


def _options(layer: str, worth: Mapping[tuple[str, str, int], float], fixed: Mapping[Key, int]) -> Sequence[Option]:
    wbits = [b for (n, s, b) in worth if n == layer and s == "weight"] or [fixed.get((layer, "weight"), FLOAT)]
    abits = [b for (n, s, b) in worth if n == layer and s == "input"] or [fixed.get((layer, "input"), FLOAT)]
    return [Option(layer, w, a) for w in wbits for a in abits]
