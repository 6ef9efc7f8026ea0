"""Writes one page a method from its recipe: what it is, how it is typed, its curve drawn from itself, its rows in the studies' tables."""

from __future__ import annotations

import inspect
import re
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bokeh.embed import components
from bokeh.models import Range1d
from bokeh.plotting import figure
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from mkdocs.structure.files import File, Files
from omegaconf import OmegaConf

from qexp.command.listing import offered
from qexp.command.root import register
from qexp.numerics.granularity import PerTensor
from qexp.recipe.head import headline, when
from qexp.report.colours import PALETTE
from qexp.statistics.stats import TensorStats

ROOT = Path(__file__).parents[1]
WIDTHS = (2, 3, 4)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of all methods, their index, and bokeh's script."""
    register()
    names = offered([ROOT / "conf"], "quant")
    tables = list(_tables())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name in names:
            text = page(name, tables)
            files.append(File.generated(config, f"methods/{name}.md", content=text))
    files.append(File.generated(config, "methods/index.md", content=index(names)))
    script = resources("bokeh") / "server" / "static" / "js" / "bokeh.min.js"
    files.append(File.generated(config, "assets/bokeh.min.js", content=script.read_text(encoding="utf-8")))
    return files


def _file(name: str) -> Path:
    return ROOT / "conf" / "quant" / f"{name}.yaml"


def index(names: list[str]) -> str:
    """Returns the page that lists all methods."""
    rows = [f"| [`{name}`]({name}.md) | {headline(_file(name))} | {when(_file(name))} |" for name in names]
    head = (
        "# Methods\n\nEach is a choice of `quant=`; most take any widths (`bits=w4a4`, `bits=w2a3`, `layer_wbit=3`). Those in "
        "`placed/NETWORK/` name the layers of one network; `ladder/` holds the steps of published pipelines, "
        "`sources/` what single projects have.\n\n"
    )
    return head + "| quant | what it is | when |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def page(name: str, tables: list[tuple[str, str, list[str]]]) -> str:
    """Returns a method's page."""
    quant = OmegaConf.to_container(compose("config", overrides=[f"quant={name}"]).quant, resolve=False)
    parts = [
        f"# `{name}`",
        headline(_file(name)) + ".",
        *([f"**When.** {when(_file(name))}"] if when(_file(name)) else []),
    ]
    parts.append(f"    python run.py quant={name}")
    shown: list[type] = []
    for site in ("weight", "input", "output"):
        spec = quant.get(site) or _from_rules(quant, site)
        if not spec or "_target_" not in spec:
            continue
        kind = get_class(spec["_target_"])
        drawn = curve(dict(spec), site)
        parts.append(f"## {site.capitalize()}: {kind.__name__}")
        if drawn:
            parts.append(drawn)
        if kind not in shown:
            parts.append(_docstring(kind))
            shown.append(kind)
        else:
            parts.append(f"As above: {kind.__name__}.")
    called = re.escape(quant["name"])
    measured = rf"\|([^|]*\|)?\s*`?{called}`?( [+(][^|]*)?\s*\|"  # methods stand in a table's first column, or after a network's
    rows = [
        (study, head, [row for row in body if re.match(measured, row) and "not run: " not in row])
        for study, head, body in tables
    ]
    for study, head, found in rows:
        if found:
            rule = "|---" * (head.count("|") - 1) + "|"
            parts.append("\n".join([f"## Measured: {study}", "", head, rule, *found]))
    parts.append("## The recipe\n\n```yaml\n" + _file(name).read_text() + "```")
    return "\n\n".join(parts) + "\n"


def _from_rules(quant: dict, site: str) -> dict | None:
    for rule in (quant.get("rules") or {}).values():
        spec = (rule or {}).get(site)
        if isinstance(spec, dict) and "_target_" in spec:
            return spec
    return None


def _docstring(kind: type) -> str:
    """Returns a class's docstring as Markdown: its first line stands out, sections become bold words."""
    text = inspect.getdoc(kind) or ""
    text = re.sub(r"\n(>>> (?:.|\n)*)", lambda m: "\n```python\n" + m.group(1).strip() + "\n```\n", text)
    text = re.sub(r"^(Args):\n", r"\n**\1.**\n\n", text, flags=re.M)
    text = re.sub(r"^(Source|Differs from the paper|Differs from the source|Levels):", r"\n**\1.**", text, flags=re.M)
    return re.sub(r"^    (\w[\w, ]*): ", r"* `\1`: ", text, flags=re.M)


def curve(spec: dict[str, Any], site: str) -> str:
    """Returns the method's own function on a bell-shaped tensor (rectified for inputs), drawn; nothing where it needs a whole network."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(20000, generator=generator) * 0.5
    sample = sample.relu() if site == "input" else sample
    fig = figure(
        height=300,
        sizing_mode="stretch_width",
        x_axis_label="value",
        y_axis_label="quantized value",
        toolbar_location=None,
    )
    grid = torch.linspace(float(sample.min()), float(sample.max()), 1500)
    counts, edges = np.histogram(sample[sample != 0].numpy(), 80)
    low, high = float(grid.min()), float(grid.max())
    fig.x_range, fig.y_range = Range1d(low, high), Range1d(low * 1.05 - 0.05, high * 1.05)
    tall = (high - low) * 0.35 / counts.max()
    bottom = float(fig.y_range.start)
    fig.quad(edges[:-1], edges[1:], bottom + tall * counts, bottom, color="#9aa3af", alpha=0.35, line_color=None)
    drawn = 0
    for bits, color in zip(WIDTHS, PALETTE):
        y = _quantized(spec, bits, sample, grid)
        if y is not None:
            fig.line(grid.numpy(), y, color=color, line_width=2, legend_label=f"{bits} bits")
            drawn += 1
    if not drawn:
        return ""
    fig.legend.location = "top_left"
    fig.background_fill_color = fig.border_fill_color = "white"  # in the dark too: its text is dark
    script, div = components(fig)
    return f'<div markdown="0">{div}{script}</div>'


def _quantized(spec: dict[str, Any], bits: int, sample: torch.Tensor, grid: torch.Tensor) -> np.ndarray | None:
    spec = {k: v for k, v in spec.items() if k not in ("bits", "granularity", "share")}
    try:
        node = OmegaConf.to_container(OmegaConf.create(spec), resolve=True)
        quantizer = instantiate(node, _convert_="all", _partial_=True)(
            bits=bits, shape=tuple(sample.shape), granularity=PerTensor()
        )
        stats = TensorStats()
        stats.update(sample.reshape(100, -1))
        quantizer.fit(stats)
        with torch.no_grad():
            return quantizer.eval()(grid).numpy()
    except Exception:  # a method that needs a layer, a network or another width has no curve of its own
        return None


def _tables():
    """Yields study, header and rows of every Markdown table of a study."""
    for readme in sorted((ROOT / "experiments").glob("*/README.md")):
        lines = readme.read_text().splitlines()
        for i, line in enumerate(lines[:-1]):
            if line.startswith("|") and re.match(r"\|[\s:|-]+\|$", lines[i + 1]):
                body = []
                for row in lines[i + 2 :]:
                    if not row.startswith("|"):
                        break
                    body.append(row)
                yield readme.parent.name, line, body
