"""How far a sweep is: one line per finished point, with the time that is left."""

from __future__ import annotations

import time
from collections import deque

from qexp.results import wording

RECENT = 10  # points; those found finished cost nothing, and come first when a sweep is started again


class Remaining:
    """Counts the points of a sweep; `line` after each.

    Args:
        total: How many there are in all; None where nobody knows.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done = total, 0
        self.began = self.last = time.monotonic()
        self.recent: deque[float] = deque(maxlen=RECENT)

    def line(self, result: str = "") -> str:
        """Returns `point 3 of 36, 12 s gone, about 2 min 10 s left: RESULT` after one more point; without the time left after the last."""
        now = time.monotonic()
        self.recent.append(now - self.last)
        self.last, self.done = now, self.done + 1
        text = f"point {self.done}{f' of {self.total}' if self.total else ''}, {wording.seconds(now - self.began)} gone"
        if self.total and self.done < self.total:
            left = (self.total - self.done) * sum(self.recent) / len(self.recent)
            text += f", about {wording.seconds(left)} left"
        return f"{text}: {result}" if result else text
