"""What the process that starts a sweep holds, what goes along into other processes, and the pages it ends with."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qexp.command.study_page import StudyPage
from qexp.results.receipts import Receipt, Watch
from qexp.results.remaining import Remaining
from tests.report.conftest import make_point

ROOT = Path(__file__).parents[2]


def test_other_processes_count_no_points(tmp_path: Path) -> None:
    page = StudyPage()
    page.remaining, page.watch = Remaining(4), Watch(tmp_path, Remaining(4))
    copy = pickle.loads(pickle.dumps(page))
    assert copy.remaining is None and copy.watch is None and page.watch is not None
    page.watch.close()
    assert json.dumps(copy.studies) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ptq", "qat", "qat_scratch", "float"])
def test_debug_fast_runs_with_every_schedule(schedule: str, tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "debug=fast", f"schedule={schedule}", f"runs_dir={tmp_path}"]
    done = subprocess.run([*command, "trainer.enable_progress_bar=false"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "debug" / "dashboard.html").exists()


@pytest.mark.slow
def test_a_sweep_over_studies_ends_with_a_page_each(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-m", "debug=fast", "study=one,two", f"runs_dir={tmp_path}"]
    done = subprocess.run([*command, "trainer.enable_progress_bar=false"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["one", "two"]
    for study in ("one", "two"):
        assert (tmp_path / study / "dashboard.html").exists() and (tmp_path / study / "results.csv").exists()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ([], "2 points failed; see above"),
        (["results.csv"], "2 points failed; see the table"),
        (["p/log.txt"], "2 points failed; see each point's log.txt"),
        (["results.csv", "p/log.txt"], "2 points failed; see the table and each point's log.txt"),
    ],
)
def test_a_failure_points_to_files_that_were_written_only(written, said, tmp_path, caplog):
    study = tmp_path / "s"
    for name in written:
        (study / name).parent.mkdir(parents=True, exist_ok=True)
        (study / name).write_text("x\n")
    page = StudyPage()
    for name in ("p", "q"):
        page._note(Receipt(str(study), name, "failed", "failed"))
    with pytest.raises(SystemExit):
        page._close()
    assert caplog.messages[-1] == said


def test_a_single_run_with_a_mistake_ends_with_its_error_and_no_table(tmp_path, caplog, capsys):
    """The table holds no row of a mistake, and its folder goes: nothing may point to them."""
    study = tmp_path / "s"
    make_point(study, "mse", 4, 4)
    wrong = make_point(study, "mse", 2, 2, status="failed", mistake=True, error="QexpError: no", value=None, drop=None)
    page = StudyPage()
    page._note(Receipt(str(study), wrong.name, "failed", "failed"))
    with pytest.raises(SystemExit):
        page.on_run_end(OmegaConf.create())
    assert caplog.messages[-1] == "1 point failed; see above"
    assert not capsys.readouterr().out and not wrong.exists() and list(study.glob("*/metrics.json"))
