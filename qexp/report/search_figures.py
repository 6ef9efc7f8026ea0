"""Figures of the results of a search or a proof of the selected point: sensitivities, the plans tried, narrow accumulators."""

from bokeh.core.properties import value
from bokeh.models import CustomJSTickFormatter, FactorRange, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from qexp.report.colours import FONT, HALO
from qexp.report.style import card_figure, empty, hover, legend_above


def search_figures() -> list[figure]:
    """Returns `sensitivity`, `trials`, `accumulator`, filled whenever a point is selected."""
    return [_sensitivity(), _trials(), _accumulator()]


def _sensitivity() -> figure:
    """Returns one bar per tensor, the most sensitive at the top, with its bits in the run's plan."""
    options = {"x_range": Range1d(0, 1), "y_range": FactorRange()}
    fig = card_figure("sensitivity", "divergence from float", "", 400, **options)
    source = empty(
        "sensitivity-bars", "x", "y", "color", "layer", "site", "bits", "divergence", "drop", "given", "note"
    )
    bars = fig.hbar("y", right="x", height=0.72, fill_color="color", fill_alpha=0.85, line_color=None, source=source)
    style = {"text_baseline": "middle", "text_font_size": "11px", "text_font": value(FONT), "text_color": "#8a8f98"}
    fig.text("x", "y", text="note", x_offset=6, source=source, **style)
    tips = [("layer", "@layer"), ("site", "@site"), ("tried at", "@bits"), ("divergence", "@divergence")]
    hover(fig, bars, [*tips, ("score lost", "@drop"), ("the plan", "@given")])
    fig.ygrid.grid_line_color = None
    return fig


def _trials() -> figure:
    """Returns one dot per tried plan, its score against its cost; plans on the Pareto front are coloured."""
    options = {"x_range": Range1d(1, 10), "y_range": Range1d(0, 1)}
    fig = card_figure("trials", "size of the packed weights", "score", 340, **options)
    tips = [("plan", "@trial"), ("score", "@score"), ("weights", "@weight_bytes"), ("bit operations", "@bops")]
    for name, color, size in (("others", "#8a8f98", 6), ("front", "#D55E00", 9)):
        source = empty(f"trials-{name}", "x", "y", "trial", "score", "weight_bytes", "bops")
        alpha = 0.4 if name == "others" else 0.95
        label = "beaten by another" if name == "others" else "beaten by none"
        look = {"color": color, "fill_alpha": alpha, "line_color": HALO, "legend_label": label}
        hover(fig, fig.scatter("x", "y", size=size, source=source, **look), tips)
    legend_above(fig)
    fig.xaxis.ticker.desired_num_ticks = 4
    fig.xaxis.formatter = CustomJSTickFormatter(code="return window.qexp ? window.qexp.tick('trials', tick) : tick")
    return fig


def _accumulator() -> figure:
    """Returns the accuracy against the accumulator's width, one line per kind of overflow."""
    options = {"x_range": Range1d(8, 32), "y_range": Range1d(0, 100)}
    fig = card_figure("accumulator", "bits of the accumulator", "score", 340, **options)
    for name, color, marker in (("saturate", "#009E73", "circle"), ("wrap", "#D55E00", "square")):
        source = empty(f"accumulator-{name}", "x", "y", "what", "accuracy", "share")
        line = {"color": color, "source": source, "legend_label": name}
        fig.line("x", "y", line_width=2, line_alpha=0.7, **line)
        dots = fig.scatter("x", "y", size=9, marker=marker, line_color=HALO, **line | {"color": color})
        hover(fig, dots, [("", "@what"), ("score", "@accuracy"), ("sums that do not fit", "@share")])
    legend_above(fig)
    fig.xaxis.formatter = NumeralTickFormatter(format="0")
    fig.xaxis.ticker.desired_num_ticks = 8
    return fig
