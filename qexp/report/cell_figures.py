"""Figures over configurations (seeds joined): the W x A grid, methods at one width, the spread over seeds."""

from bokeh.core.properties import value
from bokeh.models import FactorRange, Range1d
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from bokeh.transform import linear_cmap

from qexp.report.colours import FONT, HALO
from qexp.report.style import card_figure, empty, hover, tap

TIPS = [("", "@title"), ("mean", "@accuracy"), ("worse than float", "@drop"), ("seeds", "@seeds"), ("note", "@verdict")]


def cell_figures() -> list[figure]:
    """Returns the figures `grid`, `methods`, `seeds`; the page fills their sources from its cells."""
    return [_grid(), _methods(), _seeds()]


def _grid() -> figure:
    """Returns the heat map of accuracy, bits of the weights across, bits of the inputs upwards."""
    options = {"x_range": FactorRange(), "y_range": FactorRange(), "tools": "save"}
    fig = card_figure("grid", "bits of the weights", "bits of the inputs", 380, **options)
    source = empty(
        "grid-tiles", "x", "y", "value", "text", "ink", "row", "title", "accuracy", "drop", "seeds", "verdict"
    )
    color = linear_cmap("value", Cividis256, 0, 100)
    tiles = fig.rect("x", "y", 0.96, 0.94, fill_color=color, line_color=None, border_radius=4, source=source)
    tiles.name = "tiles"
    style = {"text_align": "center", "text_baseline": "middle", "text_font_size": "12px", "text_font": value(FONT)}
    fig.text("x", "y", text="text", text_color="ink", source=source, **style)
    fig.grid.grid_line_color = None
    hover(fig, tiles, TIPS)
    tap(fig, tiles, "tile")
    return fig


def _methods() -> figure:
    """Returns the methods at one pair of widths, best at the top, with intervals and a mark for differences within noise."""
    fig = card_figure("methods", "score", "", 340, x_range=Range1d(0, 100), y_range=FactorRange())
    source = empty(
        *("methods-dots", "x", "y", "low", "high", "color", "marker", "row"),
        *("title", "accuracy", "drop", "seeds", "verdict", "note"),
    )
    fig.segment("low", "y", "high", "y", color="color", line_width=3, line_alpha=0.45, line_cap="round", source=source)
    dots = fig.scatter("x", "y", size=10, marker="marker", color="color", line_color=HALO, source=source)
    style = {"text_baseline": "bottom", "text_align": "center", "text_font_size": "11px", "text_font": value(FONT)}
    fig.text("x", "y", text="note", y_offset=-7, text_color="#8a8f98", source=source, **style)
    hover(fig, dots, TIPS)
    tap(fig, dots, "point")
    return fig


def _seeds() -> figure:
    """Returns every configuration with several seeds: one dot per seed, a bar of one standard deviation each way."""
    fig = card_figure("seeds", "score", "", 340, x_range=Range1d(0, 100), y_range=FactorRange())
    spread = empty("seeds-spread", "y", "low", "high", "mean", "color")
    fig.segment("low", "y", "high", "y", color="color", line_width=9, line_alpha=0.25, line_cap="round", source=spread)
    fig.scatter("mean", "y", marker="dash", angle=1.5708, size=16, color="color", line_width=2, source=spread)
    source = empty("seeds-dots", "x", "y", "color", "row", "title", "accuracy", "drop", "seeds", "verdict")
    dots = fig.scatter("x", "y", size=7, color="color", fill_alpha=0.85, line_color=HALO, source=source)
    hover(fig, dots, TIPS)
    tap(fig, dots, "point")
    return fig
