"""A page that is served: it follows the sweep, stays on this machine, and shows run folders only."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qexp.errors import QexpError
from qexp.report import serve
from qexp.report.__main__ import main
from qexp.report.serve import Server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    study = tmp_path / "runs" / "s"
    study.mkdir(parents=True)
    with Server([study], study / "dashboard.html", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: Server, path: str = "", **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=20) as answer:
        return answer.read().decode()


def status(server: Server, path: str, **headers: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server, path, **headers)
    caught.value.close()
    return caught.value.code


def test_a_point_that_is_added_is_seen(served: Server, tmp_path: Path, write_point: Callable[..., Path]) -> None:
    study = tmp_path / "runs" / "s"
    nothing = get(served)
    assert "No point is finished yet" in nothing
    seen = [get(served, "version")]
    for method in ("mse", "lsq"):
        write_point(study, method, 4, 4, plain=True)
        seen.append(get(served, "version"))
        page = get(served)
        assert f"{method}-w4a4-s0" in page and f'("{seen[-1]}")' in page
    assert len(set(seen)) == 3
    assert get(served, "version") == seen[-1]
    assert "lsq-w4a4-s0" in (study / "dashboard.html").read_text(), (
        "the file on disk is as new, without the server's lines"
    )
    assert "sessionStorage" not in (study / "dashboard.html").read_text().split('id="qexp-data"')[0]


def test_files_of_the_runs_and_no_others(served: Server, tmp_path: Path, write_point: Callable[..., Path]) -> None:
    point = write_point(tmp_path / "runs" / "s", "mse", 4, 4, plain=True)
    assert get(served, f"{point.name}/config.yaml") == (point / "config.yaml").read_text()
    (tmp_path / "secret.txt").write_text("secret")
    (point / "weights.pt").write_text("binary")
    (point / "link.txt").symlink_to(tmp_path / "secret.txt")
    for path in (
        "../../secret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        f"{point.name}/weights.pt",
        f"{point.name}/link.txt",
        "no.csv",
    ):
        assert status(served, path) == 404


def exchange(server: Server, request: bytes) -> bytes:
    with socket.create_connection(server.server_address[:2], timeout=20) as sent:
        sent.sendall(request)
        answer = b""
        while part := sent.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "path", ["%00", "a%00.csv", "x" * 300 + ".csv", "x/" * 3000 + "y.csv", "%ff%fe", "..%2f..%2fetc%2fpasswd"]
)
def test_an_address_that_can_be_no_file_is_not_found(served: Server, path: str) -> None:
    assert status(served, path) == 404


@pytest.mark.parametrize("target", ["http://[", "//[x/"])
def test_an_address_that_is_none_is_a_bad_request(served: Server, target: str) -> None:
    answer = exchange(served, f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    assert answer.split()[1] in (b"400", b"404")


def test_head_says_what_get_would_without_the_page(served: Server) -> None:
    head, _, rest = exchange(served, b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n").partition(b"\r\n\r\n")
    assert head.split()[1] == b"200" and not rest and int(head.split(b"Content-Length: ")[1].split()[0]) > 100


@pytest.mark.parametrize(
    "host", ["evil@localhost", "localhost.evil.com", "localhost:80@evil.com", "[::1", "", "evil.com:localhost"]
)
def test_a_host_that_only_looks_like_this_machine_is_refused(served: Server, host: str) -> None:
    assert exchange(served, f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode()).split()[1] == b"403"


def test_a_half_sent_request_is_hung_up_on_even_if_it_drips(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE", 0.3)
    with socket.create_connection(served.server_address[:2], timeout=20) as sent, suppress(ConnectionError):
        for letter in b"GET / HTTP/1.0 and on and on and on":
            sent.sendall(bytes([letter]))
            time.sleep(0.05)
        assert sent.recv(10) == b""
    assert "No point is finished yet" in get(served), "the others are served"


def test_another_name_that_leads_here_is_refused(served: Server) -> None:
    assert served.url.startswith("http://localhost:")
    assert status(served, "", Host="example.com") == 403


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_names_its_address_and_ends_with_ctrl_c(study: Path, ending: signal.Signals) -> None:
    command = [sys.executable, "-m", "qexp.report", str(study), "--serve", "--port", "0"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a program started in the background inherits
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        line = process.stdout.readline()
        url = re.search(r"http://localhost:\d+/", line)[0]
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert b"mse-w4a4-s0" in answer.read()
        process.send_signal(ending)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
    assert "this machine only" in line and "Ctrl-C ends it" in line


def test_a_port_in_use_and_a_folder_that_is_not_there(
    served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "runs" / "s"
    assert main([str(study), "--serve", "--port", str(served.server_address[1])]) == 2
    assert "another --port may be free" in capsys.readouterr().err
    with pytest.raises(QexpError, match="no such folder"):
        Server([tmp_path / "none"], tmp_path / "page.html", port=0)
