"""The interface between a network's task and its proofs and searches: scores and decisions from outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from qexp.results.measure import Measure


class Judged(Protocol):
    """A score, for outputs of any origin: a share in 0..1, or a number in the task's own unit."""

    value: float
    measure: Measure


class Judge(Protocol):
    """The methods of a task that code uses which computes outputs without it.

    `evidence(outputs, targets)` returns what the score needs of one batch, small enough to keep for all batches; `score_of` computes the
    score from all evidence. A task that cannot score outputs alone returns None for either.
    """

    measure: Measure

    def evidence(self, outputs: Any, targets: Any) -> Any | None: ...

    def score_of(self, evidence: Sequence[Any]) -> Judged | None: ...

    def decisions(self, outputs: Any) -> Any | None:
        """Returns the decision for each sample, whole numbers `[N, ...]`; None where outputs are not decisions."""
        ...

    def divergence(self, outputs: Any, wanted: Any) -> Any | None:
        """Returns the distance of each sample's outputs from wanted ones `[N]`; None where the task has no measure of its own."""
        ...


class Judging:
    """Scores outputs batch by batch: `add` them, then read `score`; it is None without a judge or without targets."""

    def __init__(self, judge: Judge | None) -> None:
        self.judge = judge
        self._evidence: list[Any] = []

    def add(self, outputs: Any, targets: Any) -> None:
        """Adds a batch of outputs and their targets."""
        if self.judge is None or targets is None:
            return
        found = self.judge.evidence(outputs, targets)
        if found is not None:
            self._evidence.append(found)

    @property
    def score(self) -> Judged | None:
        """The score of all batches that were added."""
        return self.judge.score_of(self._evidence) if self._evidence else None

    @property
    def stored(self) -> float | None:
        """The score in the form of records: a share in percent, any other as it is."""
        score = self.score
        return None if score is None else score.measure.stored(score.value)


def differing(one: Any, other: Any) -> int | None:
    """Returns the samples of a batch for which two decisions `[N, ...]` differ anywhere; None where there are no decisions."""
    if one is None or other is None:
        return None
    return int((one != other).reshape(len(one), -1).any(1).sum())


def total(counts: Iterable[int | None]) -> int | None:
    """Returns the sum of counts; None where a count is unknown."""
    known = list(counts)
    return None if any(count is None for count in known) else sum(known)
