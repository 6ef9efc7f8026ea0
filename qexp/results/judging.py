"""What the proofs and searches of a network ask of its task: what outputs are worth, and what they decide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from qexp.results.measure import Measure


class Judged(Protocol):
    """A score, whoever computed the outputs: a share in 0..1, or a number of the task's own unit."""

    value: float
    measure: Measure


class Judge(Protocol):
    """The task of a network, as what computes outputs without it sees it.

    `evidence(outputs, targets)` is what the score needs of one batch, small enough to keep for all of them; `score_of` makes the score of
    all evidence. A task that cannot judge outputs alone gives None for either.
    """

    measure: Measure

    def evidence(self, outputs: Any, targets: Any) -> Any | None: ...

    def score_of(self, evidence: Sequence[Any]) -> Judged | None: ...

    def decisions(self, outputs: Any) -> Any | None:
        """What the network decides for each sample, whole numbers `[N, ...]`; None where outputs are no decisions."""
        ...

    def divergence(self, outputs: Any, wanted: Any) -> Any | None:
        """How far each sample's outputs are from wanted ones `[N]`; None where the task has no measure of its own."""
        ...


class Judging:
    """Outputs judged batch by batch: `add` them, then read `score`; without a judge, or without targets, there is none."""

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
        """The score of all that was added."""
        return self.judge.score_of(self._evidence) if self._evidence else None

    @property
    def stored(self) -> float | None:
        """The score as records hold it: a share in percent, everything else as it is."""
        score = self.score
        return None if score is None else score.measure.stored(score.value)


def differing(one: Any, other: Any) -> int | None:
    """Returns the samples of a batch for which two decisions `[N, ...]` differ anywhere; None where there are none."""
    if one is None or other is None:
        return None
    return int((one != other).reshape(len(one), -1).any(1).sum())


def total(counts: Iterable[int | None]) -> int | None:
    """Returns the sum of counts; None where one is not known."""
    known = list(counts)
    return None if any(count is None for count in known) else sum(known)
