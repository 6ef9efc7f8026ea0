"""Figures of the selected point: error by layer, saturation by layer, one tensor's range, training curves."""

from bokeh.models import BoxAnnotation, CustomJSTickFormatter, FactorRange, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from qexp.report.colours import ALARM, INPUT
from qexp.report.style import card_figure, empty, hover, legend_above, tap


def point_figures() -> list[figure]:
    """Returns `sqnr`, `saturation`, `depth`, `histogram`, `loss`, `score`, `rate`, `history`, filled whenever a point is selected."""
    layers = FactorRange()
    sqnr = _by_layer("sqnr", "SQNR (dB), higher is better", layers)
    saturation = _by_layer("saturation", "saturated values (%)", layers)
    return [sqnr, saturation, _depth(), _histogram(), *(_curve(name, y) for name, y in CURVES), _history()]


DEPTHS = (
    ("local", INPUT, "square", "made by the layer, on float inputs"),
    ("total", ALARM, "circle", "added up by then"),
)
CURVES = (("loss", "loss"), ("score", "score"), ("rate", "learning rate and others"))


def _by_layer(name: str, label: str, layers: FactorRange) -> figure:
    """Returns one measure by layer, input and weight as two colours, first layer at the top; the page may change the measure."""
    fig = card_figure(name, label, "", 400, x_range=Range1d(0, 1), y_range=layers)
    columns = ("x", "y", "zero", "color", "marker", "index", "layer", "site", "bits", "value", "rule", "range")
    source = empty(f"{name}-dots", *columns)
    fig.segment("zero", "y", "x", "y", color="color", line_width=1.4, line_alpha=0.4, source=source)
    dots = fig.scatter("x", "y", size=8, marker="marker", color="color", line_color=None, source=source)
    tips = [
        ("layer", "@layer"),
        ("site", "@site"),
        ("bits", "@bits"),
        ("value" if name == "saturation" else "SQNR", "@value"),
    ]
    hover(fig, dots, [*tips, ("range", "@range"), ("rule", "@rule")])
    tap(fig, dots, "layer")
    fig.ygrid.grid_line_alpha = 0.4
    return fig


def _depth() -> figure:
    """Returns the SQNR of each layer's result, from its own error and from all errors so far, first layer at the top."""
    fig = card_figure("depth", "SQNR of the layer's result (dB)", "", 400, x_range=Range1d(0, 1), y_range=FactorRange())
    for name, color, marker, label in DEPTHS:
        source = empty(f"depth-{name}", "x", "layer", "value", "what")
        fig.line("x", "layer", color=color, line_width=1.6, line_alpha=0.6, source=source, legend_label=label)
        dots = fig.scatter(
            "x", "layer", size=7, marker=marker, color=color, line_color=None, source=source, legend_label=label
        )
        hover(fig, dots, [("", "@what"), ("layer", "@layer"), ("SQNR", "@value")])
    fig.ygrid.grid_line_alpha = 0.4
    legend_above(fig, stacked=True)
    return fig


def _history() -> figure:
    """Returns the course of every quantizer during training: one line per tensor; the page selects the measure."""
    fig = card_figure("history", "training step", "", 320, x_range=Range1d(0, 1), y_range=Range1d(0, 1))
    source = empty("history-lines", "xs", "ys", "color", "name", "alpha")
    lines = fig.multi_line("xs", "ys", color="color", line_width=1.6, line_alpha="alpha", source=source)
    hover(fig, lines, [("", "@name"), ("step", "$data_x{0,0}"), ("value", "$data_y")])
    fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return fig


def _histogram() -> figure:
    """Returns the histogram of one tensor, with the values outside the range shaded and the levels as thin lines."""
    options = {"y_axis_type": "log", "y_range": Range1d(0.5, 10), "x_range": Range1d(0, 1)}
    fig = card_figure("histogram", "value of the tensor", "count (log scale)", 360, **options)
    for name in ("cut-low", "cut-high"):
        fig.add_layout(BoxAnnotation(name=name, fill_color=ALARM, fill_alpha=0.1, line_color=None, visible=False))
    bins = empty("histogram-bins", "left", "right", "top", "count", "span")
    bars = fig.quad("left", "right", "top", 0.5, source=bins, fill_color="#0072B2", fill_alpha=0.75, line_color=None)
    levels = empty("histogram-levels", "x", "alpha")
    fig.vspan("x", line_width=1, line_color="#009E73", line_alpha="alpha", source=levels)
    edges = empty("histogram-edges", "x")
    fig.vspan("x", line_width=2.2, line_color=ALARM, source=edges)
    hover(fig, bars, [("values", "@span"), ("count", "@count")])
    fig.yaxis.formatter = CustomJSTickFormatter(code="return window.qexp ? window.qexp.tick('count', tick) : tick")
    return fig


def _curve(name: str, label: str) -> figure:
    """Returns one family of training curves against the step."""
    fig = card_figure(name, "training step", label, 280, x_range=Range1d(0, 1), y_range=Range1d(0, 1))
    source = empty(f"{name}-lines", "xs", "ys", "color", "name", "dash")
    lines = fig.multi_line("xs", "ys", color="color", line_width=2, legend_field="name", source=source)
    hover(fig, lines, [("", "@name"), ("step", "$data_x{0,0}"), ("value", "$data_y")])
    fig.legend.location = "bottom_right" if name == "score" else "top_right"
    fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return fig
