"""The line a sweep prints after each point."""

import re

import pytest

from qexp.results.remaining import Remaining


def test_the_time_left_follows_the_latest_points(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(0.1 * i for i in range(1, 4)), *(0.3 + 20.0 * i for i in range(1, 12))])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    remaining = Remaining(14)
    lines = [remaining.line() for _ in range(14)]
    assert lines[0] == "point 1 of 14, 0.1 s gone, about 1.3 s left"
    assert lines[12] == "point 13 of 14, 3 min 20 s gone, about 20 s left", "what was finished earlier is forgotten"
    assert lines[13] == "point 14 of 14, 3 min 40 s gone"


def test_what_came_out_is_said_and_an_unknown_total_is_not_guessed() -> None:
    assert Remaining(2).line("W4A4: top-1 88.59 %").endswith(" left: W4A4: top-1 88.59 %")
    assert re.fullmatch(r"point 1, [\d.]+ s gone", Remaining(None).line())
