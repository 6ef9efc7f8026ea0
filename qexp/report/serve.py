"""The page of a sweep that still runs: rebuilt whenever a point is finished, and shown by a small web server."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock, Timer
from urllib.parse import quote, unquote, urlsplit

from qexp.errors import QexpError
from qexp.report.dashboard import write_page

log = logging.getLogger(__name__)

SHOWN = {  # other files of a run folder that the page links to
    ".csv": "text/plain", ".txt": "text/plain", ".yaml": "text/plain", ".json": "application/json", ".html": "text/html"
}  # fmt: skip
PATIENCE = 20  # seconds for a request to arrive
HERE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>qexp</title></head><body
style="font:16px system-ui;margin:4rem auto;max-width:40rem;padding:0 1rem">
<h1>No point is finished yet</h1><p>The page shows itself with the first one.</p></body></html>"""


class Watched:
    """The page over some studies, made again only when a point was added or changed."""

    def __init__(self, studies: Sequence[Path], page: Path) -> None:
        self.studies, self.page = [Path(study) for study in studies], page
        self._lock, self._made, self._text = Lock(), None, ""

    def version(self) -> str:
        """Returns a text that changes when a point is finished, fails or is removed."""
        found = []
        for study in self.studies:
            for path in sorted(study.glob("*/metrics.json")):
                try:
                    state = path.stat()
                except FileNotFoundError:  # replaced at this moment
                    continue
                found.append((path.parent.name, state.st_mtime_ns, state.st_size))
        return f"{hash(tuple(found)) & 0xFFFFFFFFFFFF:x}-{len(found)}"

    def text(self) -> str:
        """Returns the present page, with the script that keeps it up to date."""
        with self._lock:
            version = self.version()
            if version != self._made:
                try:
                    text = write_page(self.studies, self.page).read_text(encoding="utf-8")
                except QexpError:  # nothing to draw yet
                    text = WAITING
                script = (files("qexp.report") / "assets" / "live.js").read_text(encoding="utf-8")
                live = f"<script>\n((version) => {{\n{script}}})({json.dumps(version)});\n</script>\n</body>"
                self._text, self._made = live.join(text.rsplit("</body>", 1)), version
            return self._text

    def file(self, path: str) -> Path | None:
        """Returns the file of a run folder at an address relative to the page; None for anything else."""
        try:
            named = (self.page.parent / path).resolve()
            named.is_file()
        except (OSError, ValueError):  # a name that is too long or contains a zero byte
            return None
        inside = any(named.is_relative_to(study.resolve()) for study in self.studies)
        return named if inside and named.suffix in SHOWN and named.is_file() else None


class Server(ThreadingHTTPServer):
    """Shows the page of some studies at `url` until it is shut down.

    Args:
        studies: Folders of the studies; each must exist.
        page: File that the page is written to as well.
        address: Address to listen on; the default can be reached from this machine only.
        port: 0 chooses a free one.
    """

    daemon_threads = True

    def __init__(self, studies: Sequence[Path], page: Path, address: str = "localhost", port: int = 5006) -> None:
        for study in studies:
            if not Path(study).is_dir():
                raise QexpError(
                    f"study folder {str(study)!r}: no such folder; start the sweep first, or correct the name"
                )
        self.watched = Watched(studies, page)
        try:
            family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__(where[:2], _Handler)
        except (OSError, OverflowError) as error:
            raise QexpError(
                f"--address {address} --port {port}: cannot listen there ({error}); another --port may be free"
            ) from error
        self.private = ipaddress.ip_address(where[0]).is_loopback

    @property
    def url(self) -> str:
        """The address of the page."""
        host, port = self.server_address[:2]
        host = "localhost" if self.private else socket.gethostname() if host in ("0.0.0.0", "::") else host
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def setup(self) -> None:
        super().setup()
        # not a time limit per read: a client that sends single bytes slowly would hold the thread for ever
        self.limit = Timer(PATIENCE, self._hang_up)
        self.limit.daemon = True
        self.limit.start()

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        self.limit.cancel()
        with suppress(ConnectionError):  # the client has closed the connection
            super().finish()

    def do_GET(self) -> None:
        self.limit.cancel()  # the request is complete; the answer has no time limit
        if self.server.private and not HERE.fullmatch(self.headers.get("Host", "")):
            # another host name that resolves to this machine
            return self._send(403, "text/plain", "this page is for this machine only")
        try:
            path = unquote(urlsplit(self.path).path).lstrip("/")
        except ValueError:
            return self._send(400, "text/plain", "no such address")
        if path == "":
            return self._send(200, "text/html", self.server.watched.text())
        if path == "version":
            return self._send(200, "text/plain", self.server.watched.version())
        found = self.server.watched.file(path)
        if found is None:
            return self._send(404, "text/plain", "no such file")
        return self._send(200, SHOWN[found.suffix], found.read_text(encoding="utf-8", errors="replace"))

    do_HEAD = do_GET

    def _send(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        try:
            if self.command != "HEAD":
                self.wfile.write(content)
        except (ConnectionError, TimeoutError):  # the client has left
            log.debug("%s was not read to the end", quote(self.path))

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def serve(studies: Sequence[Path], page: Path, address: str, port: int) -> None:
    """Shows the page until Ctrl-C or a signal to end, and prints its address."""
    # The signal is also handled because a shell that starts this in the background has Ctrl-C ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with Server(studies, page, address, port) as server:
        names = ", ".join(str(study) for study in studies)
        who = "this machine only" if server.private else "ANYONE who reaches this machine may read it"
        print(f"{names}: {server.url}  ({who}; renewed with every point; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
