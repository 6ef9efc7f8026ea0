"""Opens a page in headless Chromium and hands back what a script in it reports, in real time."""

import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1300,1000"),
    # a window that nobody sees draws on, with shared memory from the disk where the machine gives little
    *("--disable-backgrounding-occluded-windows", "--disable-renderer-backgrounding", "--disable-dev-shm-usage"),
    *("--enable-logging=stderr", "--v=0", "--remote-debugging-port=0"),
    # every network request fails and leaves an error in the console
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
PROBE = """<script>
addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const until = async (holds, seconds = 120) => {
    const end = performance.now() + 1000 * seconds;
    while (!holds() && performance.now() < end) await wait(50);
  };
  let report;
  try {
    await until(() => document.documentElement.dataset.ready === "yes", 120);
    report = await (async () => { %s })();
  } catch (error) { report = { thrown: String(error.stack) }; }
  await fetch("http://127.0.0.1:%d/", { method: "POST", mode: "no-cors", body: JSON.stringify(report) });
});
</script></body>"""


def ask(chromium: str, page: Path, script: str, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """Returns what a script returned in a page opened from disk, once the page is ready, and the lines of its console.

    The script may `await wait(ms)` and `await until(() => condition)`; what it throws is reported as `thrown`.
    """
    reports: list[dict[str, Any]] = []
    arrived = threading.Event()

    class Reports(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            arrived.set()

        def log_message(self, format: str, *args: object) -> None:
            return

    profile = tempfile.mkdtemp(prefix="profile-")
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Reports) as server,
        tempfile.TemporaryFile("w+") as said,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opened = page.with_name("probe.html")
        opened.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE % (script, server.server_port)))
        command = [chromium, *FLAGS, *flags, f"--user-data-dir={profile}", opened.as_uri()]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            in_time = arrived.wait(400)
        finally:
            browser.terminate()
            browser.wait(20)
            server.shutdown()
            shutil.rmtree(profile, ignore_errors=True)
        said.seek(0)
        lines = said.read().splitlines()
    assert in_time, "the page never reported:\n" + "\n".join(lines[-20:])
    return reports[0], [line for line in lines if ":CONSOLE" in line]
