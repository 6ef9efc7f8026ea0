"""Figures with one dot per point: accuracy against bits, against size, against time."""

from bokeh.core.properties import value
from bokeh.models import ColumnDataSource, CustomJSTickFormatter, FixedTicker, LabelSet, Range1d
from bokeh.plotting import figure

from qexp.report.colours import FONT, HALO, RING
from qexp.report.style import card_figure, empty, hover, tap

TIPS = [
    ("", "@title"),
    ("score", "@accuracy"),
    ("worse than float", "@drop"),
    ("rank", "@rank"),
    ("mean bits", "@bits"),
    ("also", "@extra"),
]
DOTS = ("x", "y", "low", "high", "color", "marker", "row", "title", "accuracy", "drop", "rank", "bits", "extra")


def overview_figures() -> list[figure]:
    """Returns the figures `bits`, `size`, `time`; the page fills their sources (`bits-dots`, ...) from its rows."""
    reference = empty("float-lines", "y", "text")
    bits = card_figure("bits", "mean bits of the weights", "score", 420, **_ranges(1, 8))
    lines = empty("bits-lines", "xs", "ys", "color")
    bits.multi_line("xs", "ys", color="color", line_width=1.6, line_alpha=0.5, source=lines)
    size = card_figure("size", "packed weights", "score", 380, x_axis_type="log", **_ranges(1, 10))
    front = empty("size-front", "x", "y")
    size.step("x", "y", mode="after", line_width=2, line_color="#8a8f98", line_alpha=0.8, source=front)
    time = card_figure("time", "wall time of a point", "score", 380, x_axis_type="log", **_ranges(1, 10))
    for fig in (bits, size, time):
        _float_lines(fig, reference)
        _dots(fig)
    for fig in (size, time):
        code = f"return window.qexp ? window.qexp.tick('{fig.name}', tick) : tick"
        fig.xaxis.formatter = CustomJSTickFormatter(code=code)
    size.xaxis.ticker.desired_num_ticks = 3  # few enough for the width of a phone
    # powers of ten are not round durations, so the page sets the ticks
    time.xaxis.ticker = FixedTicker(name="time-ticks")
    return [bits, size, time]


def _ranges(start: float, end: float) -> dict[str, Range1d]:
    """Returns the ranges of a figure until the page has set them from its rows."""
    return {"x_range": Range1d(start, end), "y_range": Range1d(0, 100)}


def _float_lines(fig: figure, source: ColumnDataSource) -> None:
    """Draws the accuracy of each unquantized network as a dashed line with its name."""
    fig.hspan("y", line_dash=[6, 4], line_width=1.2, line_color="#8a8f98", source=source)
    style = {"text_font_size": "11px", "text_font": value(FONT), "text_baseline": "bottom", "text_color": "#8a8f98"}
    fig.add_layout(LabelSet(x=6, x_units="screen", y="y", text="text", y_offset=2, source=source, **style))


def _dots(fig: figure) -> None:
    """Draws the points with their 95 % intervals, and a ring around the selected one."""
    dots, ring = empty(f"{fig.name}-dots", *DOTS), empty(f"{fig.name}-ring", "x", "y")
    fig.segment("x", "low", "x", "high", color="color", line_width=1.4, line_alpha=0.55, source=dots)
    fig.scatter("x", "y", size=17, fill_color=None, line_color=RING, line_width=2, source=ring)
    glyph = fig.scatter("x", "y", size=9, marker="marker", color="color", line_color=HALO, source=dots)
    glyph.glyph.line_width = 0.8
    hover(fig, glyph, TIPS)
    tap(fig, glyph, "point")
