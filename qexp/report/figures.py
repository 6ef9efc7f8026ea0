"""The page's empty figures: the same for every study, so they are drawn once per version of this code and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from qexp.system.whole_files import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """What the page holds of the plotting library.

    Attributes:
        library: The library itself, as script elements.
        script: The script that builds all figures as one document; the page fills them from its rows.
        roots: The element of each figure, by its name.
    """

    library: str
    script: str
    roots: dict[str, str]


@cache
def figures() -> Figures:
    """Returns the figures, from the user's cache folder where this code has drawn them before: drawing takes a second or two."""
    kept = _folder() / f"page-{_version()}.json"
    try:
        return Figures(**json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not drawn yet, or damaged
        made = draw()
    try:
        write_text(kept, json.dumps(asdict(made)))
    except OSError as error:  # a cache folder that cannot be written: they are drawn again next time
        log.debug("%s: %s", kept, error)
    return made


def draw() -> Figures:
    """Returns the figures, drawn anew."""
    from bokeh.document import Document  # imported here: half a second that kept figures do not need
    from bokeh.embed import components
    from bokeh.events import DocumentReady
    from bokeh.models import CustomJS
    from bokeh.resources import Resources

    from qexp.report.cell_figures import cell_figures
    from qexp.report.overview_figures import overview_figures
    from qexp.report.point_figures import point_figures
    from qexp.report.search_figures import search_figures

    document = Document()
    drawn = [*overview_figures(), *cell_figures(), *point_figures(), *search_figures()]
    with document.models.freeze():  # else the library lists all models anew for each figure
        for fig in drawn:
            document.add_root(fig)
    document.js_on_event(DocumentReady, CustomJS(code="window.qexp.start()"))
    script, roots = components({fig.name: fig for fig in drawn})
    library = Resources(mode="inline", components=["bokeh"], log_level="warn").render_js()
    return Figures(library, script, dict(roots))


def _version() -> str:
    """Returns a hash of the plotting library's version and of the code that draws the figures."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join([version("bokeh").encode(), *code])).hexdigest()[:16]


def _folder() -> Path:
    """Returns the user's cache folder, where compiled kernels are kept too."""
    if given := os.environ.get("QEXP_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexp"
