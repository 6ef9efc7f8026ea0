"""A page that is served: it follows the sweep, stays on this machine, and shows run folders only."""

import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qexp.errors import QexpError
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
