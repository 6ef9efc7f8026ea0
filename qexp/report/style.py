"""The style of the page's figures: an empty figure that fills its card, its axes, tooltips and clicks.

Colours that depend on light or dark (text, axes, grid) are set in the browser from the page's own style sheet.
"""

from typing import Any

from bokeh.models import ColumnDataSource, CustomJS, HoverTool, ResetTool, TapTool, WheelZoomTool
from bokeh.plotting import figure

from qexp.report.colours import FONT


def card_figure(name: str, x: str, y: str, height: int = 340, **options: Any) -> figure:
    """Returns an empty figure as wide as its card, with axis names and unobtrusive tools."""
    fig = figure(
        name=name,
        x_axis_label=x,
        y_axis_label=y,
        height=height,
        sizing_mode="stretch_width",
        toolbar_location="above",
        toolbar_inner=False,  # inside, it would cover the dots at the top of the plot
        tools=options.pop("tools", "box_zoom,pan,save"),
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border=6,
        **options,
    )
    # Wheel and finger scroll the page until the reader turns on zooming.
    fig.add_tools(WheelZoomTool(), ResetTool())
    fig.toolbar.logo = None
    fig.toolbar.autohide = True
    fig.toolbar.active_scroll = None
    fig.toolbar.active_drag = None
    for axis in fig.axis:
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "12px"
        axis.major_label_text_font_size = "11px"
        axis.major_tick_in = 0
        axis.major_tick_out = 4
        axis.minor_tick_line_color = None
        axis.axis_label_standoff = 10
    return fig


def legend_above(fig: figure, stacked: bool = False) -> None:
    """Moves the legend out of the plot, where it covers nothing, even on a narrow screen."""
    legend = fig.legend[0]
    legend.orientation = "vertical" if stacked else "horizontal"
    legend.label_text_font, legend.label_text_font_size = FONT, "12px"
    legend.margin, legend.padding, legend.spacing = 0, 2, 2 if stacked else 14
    fig.add_layout(legend, "above")


def empty(name: str, *columns: str) -> ColumnDataSource:
    """Returns a named source with empty columns, to be filled by the page."""
    return ColumnDataSource({column: [] for column in columns}, name=name)


def hover(fig: figure, renderer: Any, rows: list[tuple[str, str]]) -> None:
    """Adds a tooltip; `@field` is escaped by the plotting library, so that names from configurations stay text."""
    muted = '<span style="color:var(--muted);display:inline-block;min-width:84px">{}</span>'
    lines = [f"{muted.format(label)}{field}" if label else f"<b>{field}</b>" for label, field in rows]
    tooltip = "".join(f"<div>{line}</div>" for line in lines)
    fig.add_tools(HoverTool(renderers=[renderer], tooltips=tooltip, point_policy="snap_to_data"))


def tap(fig: figure, renderer: Any, action: str) -> None:
    """Makes a click on a glyph call `qexp.tapped(action, row of the source)` in the page."""
    fig.add_tools(TapTool(renderers=[renderer]))
    code = "if (cb_obj.indices.length) window.qexp.tapped(action, source, cb_obj.indices)"
    source = renderer.data_source
    source.selected.js_on_change("indices", CustomJS(args={"source": source, "action": action}, code=code))
    renderer.nonselection_glyph = None
    renderer.selection_glyph = None
