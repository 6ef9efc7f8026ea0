"""Writes the study's page, one HTML file that opens without a network: `python -m experiments.optimal_clip.page [FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

from bokeh.embed import file_html
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, Div, TabPanel, Tabs
from bokeh.plotting import figure
from bokeh.resources import INLINE

from experiments.optimal_clip.study import BITS, PRIORS, allocation, curve, samples, tables
from qexp.ranges.aciq import analytic_alpha, exact_alpha
from qexp.report.colours import PALETTE
from qexp.report.style import card_figure, hover

_NAMES = {"gauss": "normal", "laplace": "Laplace"}


def clip_figure(prior: str) -> figure:
    """Returns the optimal clip against the scale of the prior, one line a width: straight, since the clip is a constant times it."""
    scale = PRIORS[prior]
    fig = card_figure(f"clip-{prior}", scale, "optimal clip alpha*")
    for bits, colour in zip(BITS, PALETTE):
        for kind, constant, dash in (
            ("analytic", analytic_alpha(prior, bits), "solid"),
            ("exact", exact_alpha(prior, bits, False), "dashed"),
        ):
            scales = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
            source = ColumnDataSource(
                {
                    "scale": scales,
                    "alpha": [constant * s for s in scales],
                    "label": [f"{bits} bits, {kind}: {constant:.4f} {scale}"] * len(scales),
                }
            )
            line = fig.line(
                "scale", "alpha", source=source, color=colour, line_dash=dash, line_width=2, legend_label=f"{bits} bits"
            )
            hover(fig, line, [("", "@label"), (scale, "@scale"), ("alpha*", "@alpha{0.000}")])
    _legend(fig, "top_left")
    return fig


def error_figure(prior: str) -> figure:
    """Returns the squared error against the clip: model (dashed), closed form (line), simulation (dots)."""
    fig = card_figure(f"error-{prior}", f"clip alpha / {PRIORS[prior]}", "mean squared error", 420, y_axis_type="log")
    x = samples(prior)
    for bits, colour in zip(BITS, PALETTE):
        source = ColumnDataSource(curve(prior, bits, x))
        shared = {"source": source, "color": colour, "legend_label": f"{bits} bits"}
        fig.line("alpha", "model", line_dash="dashed", line_width=1.5, **shared)
        fig.line("alpha", "exact", line_width=2, **shared)
        dots = fig.scatter("alpha", "simulated", size=6, **shared)
        rows = [("", f"{bits} bits"), ("alpha", "@alpha{0.00}"), ("model", "@model{0.0000000}")]
        hover(fig, dots, [*rows, ("closed form", "@exact{0.0000000}"), ("simulated", "@simulated{0.0000000}")])
    _legend(fig, "top_right")
    return fig


def allocation_figure() -> figure:
    """Returns the error of bits by channel over that of equal bits, against how much the channels differ."""
    fig = card_figure("allocation", "standard deviation of log sigma over channels", "error over that of equal bits")
    rows_of = {bits: allocation([i / 20 for i in range(41)], bits) for bits in (2, 3, 4)}
    for (bits, rows), colour in zip(rows_of.items(), PALETTE):
        ratios = [row["allocated"] / row["equal"] for row in rows]
        source = ColumnDataSource({"spread": [row["spread"] for row in rows], "ratio": ratios})
        line = fig.line(
            "spread", "ratio", source=source, color=colour, line_width=2, legend_label=f"{bits} bits on average"
        )
        hover(fig, line, [("", f"{bits} bits"), ("spread", "@spread{0.00}"), ("ratio", "@ratio{0.000}")])
    _legend(fig, "bottom_left")
    return fig


def _legend(fig: figure, place: str) -> None:
    fig.legend.location = place
    fig.legend.click_policy = "hide"
    fig.legend.border_line_color = None
    fig.legend.background_fill_alpha = 0.7


def page() -> str:
    """Returns the whole page as text."""
    tabs = [
        TabPanel(child=column(clip_figure(p), error_figure(p), sizing_mode="stretch_width"), title=f"{_NAMES[p]} prior")
        for p in PRIORS
    ]
    tabs.append(TabPanel(child=allocation_figure(), title="bits by channel"))
    intro = (
        "<h1>Where to clip</h1><p>Upper figure: the optimal clip against the scale of the prior; solid: the model with 2^bits steps, "
        "dashed: the quantizer as it is (2^bits - 1 steps, zero on a level). Lower figure: the error along the clip; dashed: the model, "
        "line: closed form of the real quantizer, dots: that quantizer on 200,000 draws. A click on the legend hides a width.</p>"
    )
    layout = column(Div(text=intro), Tabs(tabs=tabs, sizing_mode="stretch_width"), sizing_mode="stretch_width")
    return file_html(layout, INLINE, "Where to clip")


def main(argv: list[str]) -> None:
    """Writes the page and prints the tables of the README."""
    out = Path(argv[0]) if argv else Path("runs/optimal_clip.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), encoding="utf-8")
    print(tables())
    print(f"\npage: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
