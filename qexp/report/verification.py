"""The page of a verification run: ROC, cosines of same and different pairs, the pairs that shifted most."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from bokeh.embed import components
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, NumeralTickFormatter
from bokeh.plotting import figure
from bokeh.resources import INLINE
from PIL import Image

from qexp.report.style import card_figure
from qexp.system.whole_files import write_text

SHOWN = 20  # number of pairs in the table
_FLOAT, _QUANT = "#6b7280", "#0072B2"
_SAME, _OTHER = "#009E73", "#D55E00"
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; background: #fff; color: #1f2937; }
section { overflow-x: auto; }
.plots { background: #fff; border-radius: 8px; padding: 8px; }  /* the figures are drawn for a light ground */
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #d1d5db; white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; }
img { height: 72px; vertical-align: middle; border-radius: 4px; }
.changed { font-weight: 600; }
@media (prefers-color-scheme: dark) { body { background: #14171c; color: #e5e7eb; } th, td { border-color: #374151; } }
</style>$bokeh</head><body><h1>$title</h1><p>$summary</p>
<section class="plots">$plots</section><h2>Pairs whose cosine shifted most</h2><section>$table</section>$script</body></html>
""")


def write_verification(folder: Path) -> Path:
    """Returns the path of `verification.html`, made from the run's `pairs.csv`, and from `faces.npz` where the run kept faces."""
    faces = {}
    if (folder / "faces.npz").is_file():
        with np.load(folder / "faces.npz", allow_pickle=False) as kept:
            faces = dict(zip(kept["names"].tolist(), kept["images"]))
    table = pd.read_csv(folder / "pairs.csv")
    paired = "cosine_float" in table
    script, plots = components(column(roc(table), cosines(table), sizing_mode="stretch_width"))
    changed = int((table.correct != table.correct_float).sum()) if paired else 0
    summary = f"{len(table)} pairs, {100 * table.correct.mean():.2f} % judged rightly" + (
        f"; in float {100 * table.correct_float.mean():.2f} %; {changed} pairs are judged differently" if paired else ""
    )
    values = {
        "title": f"Verification, run {html.escape(folder.name)}",
        "summary": summary,
        "bokeh": INLINE.render(),
        "plots": plots,
        "script": script,
        "table": _pairs(table.head(SHOWN), faces, paired),
    }
    return write_text(folder / "verification.html", _PAGE.substitute(values))


def rates(cosines: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns false and true accept rates at every threshold, from the strictest to the loosest."""
    order = np.argsort(-cosines, kind="stable")
    hits, values = same[order], cosines[order]
    last = np.append(values[1:] != values[:-1], True)  # equal cosines are accepted together
    far = np.cumsum(~hits)[last] / max((~same).sum(), 1)
    tar = np.cumsum(hits)[last] / max(same.sum(), 1)
    return np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])


def roc(table: pd.DataFrame) -> figure:
    """Returns the ROC of the quantized network and of the float one."""
    least = 0.5 / max(int((~table.same).sum()), 1)  # a rate of zero has no logarithm
    fig = card_figure("roc", "false accept rate", "true accept rate", 360, x_axis_type="log")
    for name, key, color, dash in (
        ("float", "cosine_float", _FLOAT, "dashed"),
        ("quantized", "cosine", _QUANT, "solid"),
    ):
        if key in table:
            far, tar = rates(table[key].to_numpy(), table.same.to_numpy())
            fig.step(
                np.maximum(far, least), tar, mode="after", color=color, line_dash=dash, line_width=2, legend_label=name
            )
    fig.legend.location = "bottom_right"
    fig.yaxis.formatter = fig.xaxis.formatter = NumeralTickFormatter(format="0.[000] %")
    return fig


def cosines(table: pd.DataFrame) -> figure:
    """Returns the histograms of the quantized network's cosines, of same and of different pairs."""
    fig = card_figure("cosines", "cosine of the two embeddings", "pairs", 300)
    edges = np.linspace(-1, 1, 81)
    for name, rows, color in (("one person", table[table.same], _SAME), ("two people", table[~table.same], _OTHER)):
        counts, _ = np.histogram(rows.cosine, edges)
        source = ColumnDataSource({"left": edges[:-1], "right": edges[1:], "top": counts})
        fig.quad("left", "right", "top", 0, source=source, color=color, alpha=0.6, legend_label=name)
    return fig


def _pairs(table: pd.DataFrame, faces: Mapping[str, np.ndarray], paired: bool) -> str:
    heads = [
        "fold",
        "pair",
        *(["faces"] if faces else []),
        "cosine in float" if paired else "",
        "cosine",
        "shift",
        "judged",
    ]
    rows = []
    for number, row in zip(table.index, table.itertuples()):
        verdict = "right" if row.correct else "wrong"
        changed = paired and row.correct != row.correct_float
        cells = [str(row.fold), "one person" if row.same else "two people"]
        if faces:
            cells.append("".join(_picture(faces[name]) for name in (row.a, row.b) if name in faces))
        cells += [
            f"{row.cosine_float:.3f}" if paired else "",
            f"{row.cosine:.3f}",
            f"{row.shift:+.3f}" if paired else "",
        ]
        cells.append(
            f'<span class="changed">{verdict} (was {"right" if row.correct_float else "wrong"})</span>'
            if changed
            else verdict
        )
        rows.append(f'<tr data-pair="{number}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _picture(face: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(face)).save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
