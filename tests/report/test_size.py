"""A study of 500 points: the page stays small and quick in a real browser."""

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qexp.report.dashboard import write_dashboard

pytestmark = [pytest.mark.slow, pytest.mark.browser]
POINTS, METHODS = 500, ("minmax", "mse", "aciq", "lsq", "pact")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--window-size=1300,1000",
)
PROBE = """<script>
addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  while (document.documentElement.dataset.ready !== "yes") await wait(5);
  const loaded = performance.now();
  const at = qexp.model("bits-dots").data.row.length - 1;
  qexp.model("bits-dots").selected.indices = [at];
  await wait(0);
  const report = { loaded, selected: performance.now() - loaded, dots: at + 1, problems: qexp.byId("problems").textContent,
    title: qexp.byId("h-point").textContent, layers: document.querySelectorAll("#plan tbody tr").length };
  await fetch("report", { method: "POST", body: JSON.stringify(report) });
});
</script></body>"""


def measure(page: Path, chromium: str, profile: Path) -> dict[str, Any]:
    """Returns what the page says of itself, `loaded` and `selected` in milliseconds of real time."""
    content = page.read_text(encoding="utf-8").replace("</body>", PROBE).encode()
    reports: list[dict[str, Any]] = []
    arrived = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(content)

        def do_POST(self) -> None:
            reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(b"")
            arrived.set()

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            chromium,
            *FLAGS,
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            f"http://127.0.0.1:{server.server_port}/",
        ]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert arrived.wait(240), "the page never reported"
        finally:
            browser.terminate()
            browser.wait(20)
            server.shutdown()
    shutil.rmtree(profile, ignore_errors=True)
    return reports[0]


def test_500_points_load_and_answer(
    tmp_path: Path, chromium: str, write_point: Callable[..., Path], write_findings: Callable[[Path], None]
) -> None:
    folder = tmp_path / "big"
    for i in range(POINTS):
        point = write_point(folder, METHODS[i % 5], 2 + i // 5 % 7, 2 + i // 35 % 7, seed=i // 245)
    write_findings(point)
    page = write_dashboard(folder)
    report = measure(page, chromium, tmp_path / "profile")
    print(
        f"{page.stat().st_size / 1e6:.2f} MB, ready after {report['loaded']:.0f} ms, a selection takes {report['selected']:.0f} ms"
    )
    assert page.stat().st_size < 5_000_000
    assert (report["dots"], report["problems"], report["layers"]) == (POINTS, "", 44)
    assert report["loaded"] < 60_000
