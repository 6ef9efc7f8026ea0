"""How far a sweep is: one line a finished point, with the time that is left."""

from __future__ import annotations

import math
import time
from collections import deque

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

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


def points_of(config: DictConfig) -> int | None:
    """Returns how many points the sweep asks for: the product of its lists; None where a sweeper decides as it goes."""
    if not str(OmegaConf.select(config, "hydra.sweeper._target_")).endswith("BasicSweeper"):
        return None
    params = config.hydra.sweeper.get("params") or {}
    asked = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    # the command line's come last, so that one value there overrules a preset's sweep
    choices = {
        parsed.get_key_element(): len(list(parsed.sweep_string_iterator())) if parsed.is_sweep_override() else 1
        for parsed in OverridesParser.create().parse_overrides(asked)
    }
    return math.prod(choices.values())
