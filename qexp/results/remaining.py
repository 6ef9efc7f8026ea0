"""Progress of a sweep: one line per finished point, with the time that is left."""

from __future__ import annotations

import time
from collections import deque

from qexp.results import wording

RECENT = 10  # points for the estimate; when a sweep is started again, finished points come first and take no time


class Remaining:
    """Counts the points of a sweep; call `line` after each.

    Args:
        total: The number of points; None where it is unknown.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done = total, 0
        self.began = self.last = time.monotonic()
        self.recent: deque[float] = deque(maxlen=RECENT)

    def line(self, result: str = "") -> str:
        """Returns `point 3 of 36, 12 s gone, about 2 min 10 s left: RESULT` after one more point; the last line has no time left."""
        now = time.monotonic()
        self.recent.append(now - self.last)
        self.last, self.done = now, self.done + 1
        text = f"point {self.done}{f' of {self.total}' if self.total else ''}, {wording.seconds(now - self.began)} gone"
        if self.total and self.done < self.total:
            left = (self.total - self.done) * sum(self.recent) / len(self.recent)
            text += f", about {wording.seconds(left)} left"
        return f"{text}: {result}" if result else text
