"""What the process that starts a sweep holds, and what goes along into other processes."""

import json
import pickle
from pathlib import Path

from qexp.command.study_page import StudyPage
from qexp.results.receipts import Watch
from qexp.results.remaining import Remaining


def test_other_processes_count_no_points(tmp_path: Path) -> None:
    page = StudyPage()
    page.remaining, page.watch = Remaining(4), Watch(tmp_path, Remaining(4))
    copy = pickle.loads(pickle.dumps(page))
    assert copy.remaining is None and copy.watch is None and page.watch is not None
    page.watch.close()
    assert json.dumps(copy.studies) == "[]"
