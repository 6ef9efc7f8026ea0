"""Results of a run: its row, the table of tensors, histograms, and a one-line summary."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from qexp.analysis.channel_spread import channel_measures
from qexp.analysis.diagnosis import diagnose
from qexp.analysis.error_by_depth import errors_by_depth, norm_drift
from qexp.analysis.tensor_errors import Measures
from qexp.calibration.memory_cache import weight_stats
from qexp.calibration.site_stats import Calibration
from qexp.calibration.summary import summary
from qexp.layers.quantized import WEIGHTED, float_class, quantizers, weight_of
from qexp.network.cost import cost, layer_costs, quantized_macs
from qexp.network.facts import Facts
from qexp.network.hardware_cost import hardware
from qexp.numerics.widths import FLOAT
from qexp.quantizers.base import Quantizer
from qexp.quantizers.ends import ends
from qexp.recipe import Plan
from qexp.recipe.plan import Source
from qexp.results import wording
from qexp.results.measure import Measure
from qexp.results.run_folder import commit
from qexp.results.run_folder_read import read_history
from qexp.run import saved_network
from qexp.run.devices import device_name
from qexp.run.experiment import Experiment
from qexp.run.naming import asked, reference_name
from qexp.statistics.stats import TensorStats
from qexp.system.whole_files import whole
from qexp.tasks.base import Score

log = logging.getLogger(__name__)
_HISTOGRAM_BINS = 128
_MAX_LEVELS = 257


def line(metrics: dict[str, Any]) -> str:
    """Returns a point's result in one line."""
    measure = Measure.of(metrics)
    text = f"{measure.label} {measure.text(metrics['value'])}"
    if wording.is_number(metrics.get("ci_low")):
        text += f" [{measure.number(metrics['ci_low'])}, {measure.number(metrics['ci_high'])}]"
    if metrics.get("drop") is not None:
        apart, against = metrics["value_float"] - metrics["value"], wording.reference(metrics)
        below = round(apart, 2) > 0 or (round(apart, 2) == 0 and measure.higher_is_better)
        text += f", {measure.distance(apart)} {'below' if below else 'above'} {against} {measure.text(metrics['value_float'])}"
    share = wording.partly(metrics)
    return f"{text}; {share} of the products are quantized" if share else text


def plan_line(plan: Plan, facts: Facts, model: nn.Module) -> str:
    """Returns the resolved plan in one line: how many quantizers, where, and which products stay in float."""
    head = f"plan: {sum(e.spec is not None for e in plan)} quantizers on {len({e.layer for e in plan})} layers"
    head = f"{head}; first layer {facts.first or 'none'}, last {facts.last or 'none'}"
    layers, bits = layer_costs(model, facts), (plan.bits("weight"), plan.bits("input"))
    share, left = quantized_macs(layers, facts.products, *bits, plan.operand_bits())
    if not left or not any(e.spec is not None for e in plan):
        return head
    names = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return f"{head}; {wording.percent(share)} of the products are quantized, in float stay {names}"


def plan_summary(plan: Plan, facts: Facts, model: nn.Module) -> str:
    """Returns the resolved plan as a table, one row per layer: the quantizers of its weight and input, and the rule that set each."""
    frame = plan.frame()
    rows = []
    for layer, part in frame.groupby("layer", sort=False):
        cells = {site: group.iloc[0] for site, group in part.groupby("site", sort=False)}
        text = []
        for site in cells:
            c = cells[site]
            what = "float" if c.quantizer == "float" else f"{c.quantizer}/{c.granularity} {c.range}".strip()
            text.append(f"{site} {c.bits}b {what} <- {c.rule}")
        rows.append(f"  {layer:<28} " + "; ".join(text))
    return "\n".join([plan_line(plan, facts, model), *rows])


def found_by_search(asked_for: Plan, found: Plan) -> str:
    """Returns the plan that a search found in one line: the widths that it changed, or that none was worth a change."""
    before = {(e.layer, e.site): e.bits for e in asked_for if e.spec is not None}
    after = {(e.layer, e.site): e.bits for e in found if e.spec is not None}
    changed = {key: bits for key, bits in after.items() if before.get(key) != bits}
    if not changed:
        return "search: the widths that were asked for are the best plan within the budget; none was changed"
    parts = []
    for site in dict.fromkeys(site for _, site in after):
        names = [f"{layer} {bits}" for (layer, own), bits in after.items() if own == site]
        parts.append(f"{site} bits {', '.join(names)}")
    return f"search: {len(changed)} of {len(after)} widths changed; {'; '.join(parts)}"


def next_step(run: Experiment) -> str:
    """Returns where a searched plan lies, and the words that train a network with it."""
    plan, settings = run.folder / "layers.csv", run.settings
    words = f"quant=lsq plan={plan}" if not settings.trains else f"plan={plan} (without search=)"
    return f"the plan: {plan}; the same command with {words} trains it"


def warn_of_chance(reference: Score | None, num_classes: int) -> None:
    """Logs a warning if a float network scores no better than guessing one of the classes: what quantization costs it means nothing."""
    if reference is None or reference.metric != "top1" or num_classes < 2 or reference.low > 1 / num_classes:
        return
    log.warning(
        "the float network is right on %s, which guessing among %d classes is too: check the weights, the preprocessing and the order of "
        "the classes",
        reference.measure.text(reference.measure.stored(reference.value)),
        num_classes,
    )


def metrics(run: Experiment) -> dict[str, Any]:
    """Returns the point's row of `results.csv`; a score that is a share is given in percent, any other as it is.

    `drop` is positive where the score is worse than the float network's, also for metrics where less is better.
    """
    settings, model, facts, plan, score, reference = (
        run.settings,
        run.model,
        run.facts,
        run.plan,
        run.score,
        run.reference,
    )
    seconds = run.seconds
    layers = layer_costs(model, facts)
    bits, operands = (plan.bits("weight"), plan.bits("input")), plan.operand_bits()
    price = cost(layers, *bits, run.params, facts.products, operands)
    share, _ = quantized_macs(layers, facts.products, *bits, operands)
    measure = score.measure
    value, value_float = measure.stored(score.value), measure.stored(reference.value) if reference else None
    carried = {e.by for e in plan}
    first_input = next((e for e in plan if e.layer == facts.first and e.site == "input"), None)
    shared = [str(e.spec.get("granularity", "tensor")) for e in plan if e.site == "weight" and e.spec]
    adds = [n for n in facts.order if float_class(model.get_submodule(n)).__name__ == "Add"]
    quantized_adds = [e for e in plan if e.layer in adds and e.spec]
    return {
        "status": "ok",
        "error": "",
        **asked(settings),
        "mean_wbit": round(price.mean_wbit, 4),
        "mean_abit": round(price.mean_abit, 4),
        **measure.columns(),
        "value": value,
        "value_float": value_float,
        "reference": reference_name(settings),
        "drop": None if value_float is None else measure.lost(value, value_float),
        "ci_low": measure.stored(score.low),
        "ci_high": measure.stored(score.high),
        "interval": score.interval,
        "ci_low_float": measure.stored(reference.low) if reference else None,
        "ci_high_float": measure.stored(reference.high) if reference else None,
        "interval_float": reference.interval if reference else None,
        **{name: measure.stored(number) for name, number in score.others.items()},
        **{f"{name}_float": measure.stored(number) for name, number in (reference.others.items() if reference else ())},
        "n_eval": score.n,
        "params": price.params,
        "macs": price.macs,
        "quantized_macs": round(share, 4) if any(e.spec is not None for e in plan) else None,
        "bops": price.bops,
        "weight_bytes": price.weight_bytes,
        "weight_bytes_float": price.weight_bytes_float,
        **hardware(model, facts, plan.bits("weight"), plan.bits("input"), plan.bits("output"), plan.operand_bits()),
        "seconds_calibrate": round(seconds.get("calibrate", 0.0), 3),
        **({"seconds_search": round(seconds["search"], 3)} if "search" in seconds else {}),
        "seconds_train": round(seconds.get("train", 0.0), 3),
        "seconds_evaluate": round(seconds.get("evaluate", 0.0), 3),
        "device": device_name(settings.trainer),
        "precision": settings.trainer.precision,
        "tf32": settings.trainer.tf32,
        "kernels": run.kernels,
        "point": run.folder.name,
        "n_calibrate": settings.n_calibrate and sum(map(len, run.images)),
        "torch": torch.__version__,
        "commit": commit(),
        "rounding": ", ".join(sorted({q.rounding for _, _, q in quantizers(model)})),
        "granularity": max(shared, key=shared.count) if shared else "",
        "add": "quantized" if quantized_adds else "float",
        "quantize_input": bool(first_input and first_input.spec),
        "rules": sorted(carried),
    }


def write(run: Experiment) -> None:
    """Writes `layers.csv`, `statistics.csv`, `histograms.json`, `depth.json`, the results of each sample and `metrics.json`.

    `metrics.json` is written last, after the diagnosis has been added to the row.

    `correct.npy` holds whether each sample was right, where samples are right or wrong; `outcomes.npz` holds the task's other arrays.
    """
    record, model, plan, facts, seen = run.record, run.model, run.plan, run.facts, run.statistics
    row, images = run.metrics, run.images[0]
    depth, own, measured = errors_by_depth(model, images)
    norms = norm_drift(model, images)
    table = layer_table(model, plan, facts, seen, measured, own)
    record.write("layers.csv", table.to_csv(index=False))
    record.write("statistics.csv", summary(seen).to_csv(index=False))
    record.write("histograms.json", json.dumps(histograms(model, seen)))
    rest = dict(run.score.outcomes)
    if "correct" in rest:
        with whole(record.folder / "correct.npy") as part, part.open("wb") as file:
            np.save(file, rest.pop("correct"))
    if rest:
        with whole(record.folder / "outcomes.npz") as part, part.open("wb") as file:
            np.savez_compressed(file, **rest)
    record.write_bytes(saved_network.FILE, saved_network.serialized(model, plan, run.origin, run.data.example()))
    record.write("depth.json", json.dumps({"layers": depth, "norms": norms}))
    row["diagnosis"] = diagnose(row, table, depth, norms, read_history(record.folder))
    if row["diagnosis"]:
        log.warning("collapsed: %s", "\n  ".join(row["diagnosis"]))
    row["quantized_layers"] = int(table[table.quantizer != "float"].layer.nunique())
    row["left_float"] = left_float(model, plan, facts)
    row["worst_sqnr"] = float(table.sqnr.min()) if table.sqnr.notna().any() else None
    record.metrics(row)


def layer_table(
    model: nn.Module,
    plan: Plan,
    facts: Facts,
    seen: Calibration,
    measured: Measures,
    own: Measures,
) -> pd.DataFrame:
    """Returns the plan with the results of calibration and of quantization, one row per (layer, site)."""
    costs = layer_costs(model, facts)
    fitted = {(name, site): q for name, site, q in quantizers(model)}
    rows = []
    for base in plan.frame().to_dict("records"):
        key = (base["layer"], base["site"])
        row = dict(base)
        if key in fitted:
            q = fitted[key]
            scale, zero = torch.as_tensor(q.scale).detach().flatten(), torch.as_tensor(q.zero_point).detach().flatten()
            low, high = ends(q)
            row |= q.describe() | {"scale": _brief(scale), "zero_point": _brief(zero)}
            row |= {"low": low, "high": high}
            row |= measured.get(key, {}) | own.get(key, {}) | channel_measures(model, *key, q, seen)
        if base["layer"] in costs:
            c = costs[base["layer"]]
            row |= {
                "weights": c.weights if base["site"] == "weight" else "",
                "macs": c.macs if base["site"] == "weight" else "",
            }
            if base["site"] == "weight":
                row["bops"] = c.macs * base["bits"] * plan.bits("input").get(base["layer"], FLOAT)
        rows.append(row)
    columns = [
        "layer",
        "site",
        "quantizer",
        "bits",
        "granularity",
        "signed",
        "range",
        "rule",
        "scale",
        "zero_point",
        "levels",
        "levels_used",
        "sqnr",
        "mse",
        "cosine",
        "norm1",
        "saturation",
        "entropy",
        "weights",
        "macs",
        "bops",
        "low",
        "high",
        "rounding",
        "sqnr_float",
        "saturation_float",
        "channel_spread",
        "sqnr_channel",
        "source",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def left_float(model: nn.Module, plan: Plan, facts: Facts) -> list[str]:
    """Returns the tensors of weighted layers that stay in float, and the adds, norms and pools without a quantizer."""
    names = [f"{e.layer}.{e.site}" for e in plan if e.spec is None and e.source is not Source.ARRIVES]
    carried = {e.layer for e in plan if e.spec is not None}
    skip = (*WEIGHTED, nn.ReLU, nn.ReLU6, nn.MaxPool2d)
    names += [n for n in facts.order if n not in carried and not issubclass(float_class(model.get_submodule(n)), skip)]
    return [*names, *(n for n in facts.products if n.rpartition(" (")[0] not in carried)]


def histograms(model: nn.Module, seen: Calibration) -> list[dict[str, Any]]:
    """Returns each quantized tensor's histogram with its range and levels, for the page."""
    out = []
    for name, site, q in quantizers(model):
        weight = weight_of(model.get_submodule(name), site)
        stats = None
        if weight is not None:
            stats = weight_stats(weight, exact=False, bins=512)
        elif (name, site) in seen:
            stats = seen[name, site].tensor
        if stats is None or stats.histogram is None:
            continue
        seen_values = stats.remember("histogram of the page", partial(_folded, stats))
        low, high = ends(q)
        out.append({"layer": name, "site": site, **seen_values, "low": low, "high": high, "levels": _levels(q)})
    return out


def _levels(q: Quantizer) -> list[float] | None:
    """Returns the levels of a quantizer with one scale, where they are few enough to draw."""
    scale, zero = (torch.as_tensor(v).detach().flatten() for v in (q.scale, q.zero_point))
    least, most = (torch.as_tensor(v).float() for v in q.limits)
    least, most = float(least.min()), float(most.max())
    if scale.numel() != 1 or most - least + 1 > _MAX_LEVELS:
        return None
    codes = torch.arange(least, most + 1, device=scale.device)
    return [round(level, 6) for level in ((codes - zero[0]) * scale[0]).tolist()]


def _folded(stats: TensorStats) -> dict[str, Any]:
    """Returns the histogram of the observed values, reduced to the number of bins that a page draws."""
    low, high = float(stats.min[0]), float(stats.max[0])
    values, counts = stats.density.points()
    width = max((high - low) / _HISTOGRAM_BINS, 1e-12)
    nonzero = values[0] != 0
    folded, _ = np.histogram(
        values[0][nonzero].numpy(),
        bins=_HISTOGRAM_BINS,
        range=(low, low + width * _HISTOGRAM_BINS),
        weights=counts[0][nonzero].numpy(),
    )
    return {
        "low_edge": low,
        "bin_width": width,
        "counts": [int(c) for c in folded],
        "zeros": int(stats.zeros[0]),
        "count": int(stats.count[0]),
    }


def _brief(values: Tensor) -> float | str:
    """Returns a single number as it is, and several as `least..greatest`."""
    if values.numel() == 1 or bool((values == values[0]).all()):
        return float(f"{float(values[0]):.9g}")
    return f"{float(values.min()):.6g}..{float(values.max()):.6g}"
