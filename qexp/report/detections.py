"""The page of a detection run: a few test images with their boxes, float beside quantized."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from qexp.errors import QexpError
from qexp.system.whole_files import write_text

STYLE = """
:root { color-scheme: light dark; --ink: #1b2027; --muted: #6b7482; --card: #fff; --bg: #f5f6f8; --line: #e4e7ec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf0; --muted: #929cab; --card: #171b21; --bg: #0f1216; --line: #2a313b; }
}
body { margin: 0 auto; padding: 40px 28px; max-width: 1100px; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 4px; font-size: 28px; letter-spacing: -.02em; }
p, figcaption { color: var(--muted); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin: 0 0 22px; padding: 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; }
.pair > b { grid-column: 1 / -1; font-weight: 600; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; background: var(--picture) center / 100% 100%; border-radius: 6px; }
rect { fill: none; stroke-width: 2.5; vector-effect: non-scaling-stroke; }
.object rect { stroke: #fff; stroke-dasharray: 5 4; stroke-width: 1.5; }
.right rect { stroke: #00b386; } .wrong rect { stroke: #ff8a3d; } .ignored rect { stroke: #9aa4b2; }
text { font-weight: 600; fill: #fff; paint-order: stroke; stroke: #0009; stroke-width: 3px; }
.key span { margin-right: 18px; } .key i { display: inline-block; width: 22px; border-top: 3px solid; vertical-align: middle; }
table { border-collapse: collapse; margin: 8px 0 28px; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 16px 3px 0; text-align: right; border-bottom: 1px solid var(--line); } td:first-child { text-align: left; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
"""
KEY = (
    '<p class="key"><span><i style="color:#00b386"></i> right</span><span><i style="color:#ff8a3d"></i> wrong</span>'
    '<span><i style="border-top-style:dashed"></i> annotated object</span></p>'
)
KINDS = {1: "right", 0: "wrong", -1: "ignored"}


def write_detections(folder: Path) -> Path:
    """Returns the path of `detections.html`, made from the run's `detections.json`.

    Raises:
        QexpError: The file is missing or damaged.
    """
    source = folder / "detections.json"
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        return write_text(folder / "detections.html", render(content))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QexpError(f"{source}: cannot be shown ({error!r}); run the point again with force=true") from error


def render(content: dict[str, Any]) -> str:
    """Returns the page: the precision of each class, then the images; opens without a network."""
    title = html.escape(content["title"])
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<h1>{title}</h1><p>{html.escape(content['about'])}</p>{_classes(content['classes'])}{KEY}",
    ]
    for image in content["images"]:
        parts.append(f'<div class="pair" style="--picture:url(data:image/jpeg;base64,{image["jpeg"]})">')
        parts.append(f"<b>{html.escape(image['name'])}</b>")
        for name in ("float", "quantized"):
            if image.get(name) is not None:
                parts.append(_panel(image, name, content["names"]))
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>"])


def _classes(rows: list[list[Any]]) -> str:
    """Returns the table of average precision by class: name, objects, float, quantized."""

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))

    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr><th>class</th><th>objects</th><th>float AP %</th><th>quantized AP %</th></tr>{body}</table>"


def _panel(image: dict[str, Any], name: str, classes: list[str]) -> str:
    """Returns one image with the boxes of one network."""
    width, height = image["width"], image["height"]
    objects = "".join(_box(box, width, height) for box in image["objects"])
    found = []
    for label, score, hit, *box in image[name]:
        x, y = max(box[0] * width, 0) + 4, max(box[1] * height, 0) + 0.045 * width
        words = f'<text x="{x:.1f}" y="{y:.1f}" font-size="{0.042 * width:.1f}">{html.escape(classes[label])} {score:.2f}</text>'
        found.append(f'<g class="{KINDS[hit]}">{_box(box, width, height)}{words}</g>')
    right = sum(hit == 1 for _, _, hit, *_ in image[name])
    caption = f"{name}: {right} right, {sum(hit == 0 for _, _, hit, *_ in image[name])} wrong"
    shapes = f'<g class="object">{objects}</g>{"".join(found)}'
    return f'<figure><svg viewBox="0 0 {width} {height}">{shapes}</svg><figcaption>{caption}</figcaption></figure>'


def _box(box: list[float], width: int, height: int) -> str:
    """Returns a rectangle, given its corners in shares of the image, cut at the image's edge."""
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) * side for v, side in zip(box, (width, height, width, height)))
    return f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"/>'
