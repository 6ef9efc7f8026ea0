"""A study of 500 points: the page stays small and quick in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qexp.report.dashboard import write_dashboard
from tests.report.browser import ask

pytestmark = [pytest.mark.slow, pytest.mark.browser]
POINTS, METHODS = 500, ("minmax", "mse", "aciq", "lsq", "pact")
PROBE = """
const loaded = performance.now();
const at = qexp.model("bits-dots").data.row.length - 1;
qexp.model("bits-dots").selected.indices = [at];
await wait(0);
const selected = performance.now() - loaded;
const lines = () => document.querySelectorAll("#board tbody tr").length;
const first = lines();
document.querySelector("#board tfoot button").click();
return { first, more: lines(), loaded, selected, dots: at + 1, problems: qexp.byId("problems").textContent,
  title: qexp.byId("h-point").textContent, layers: document.querySelectorAll("#plan tbody tr").length };
"""


def test_500_points_load_and_answer(
    tmp_path: Path, chromium: str, write_point: Callable[..., Path], write_findings: Callable[[Path], None]
) -> None:
    folder = tmp_path / "big"
    for i in range(POINTS):
        point = write_point(folder, METHODS[i % 5], 2 + i // 5 % 7, 2 + i // 35 % 7, seed=i // 245)
    write_findings(point)
    page = write_dashboard(folder)
    report, _ = ask(chromium, page, PROBE)
    print(
        f"{page.stat().st_size / 1e6:.2f} MB, ready after {report['loaded']:.0f} ms, a selection takes {report['selected']:.0f} ms"
    )
    assert page.stat().st_size < 5_000_000
    assert (report["dots"], report["problems"], report["layers"]) == (POINTS, "", 44)
    assert report["loaded"] < 60_000
    assert (report["first"], report["more"]) == (200, 400)
