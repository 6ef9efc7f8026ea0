"""The function calls of a run that a module could stand for, and what several runs have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qexp.layers.forms import Form
from qexp.network.graph import same

Key = tuple[str, str]  # a module's name and the name of a call inside it


@dataclass
class MadeCall:
    """A function call in the `forward` of a module.

    Attributes:
        kind, number: Its kind, and its place among the module's calls of this kind.
        of: How many calls of this kind the module makes; None if that differs.
        forms: The call as one of a module, for each time the module ran; None where there is no such module.
    """

    kind: str
    number: int
    of: int | None
    forms: list[Form | None] = field(default_factory=list)


@dataclass
class MadeCalls:
    """The calls of one run.

    Attributes:
        made: Each call that computes with the images.
        counted: By module and kind, the number of all calls each time the module ran.
    """

    made: dict[Key, MadeCall] = field(default_factory=dict)
    counted: dict[Key, list[int]] = field(default_factory=dict)

    def add(self, key: Key, kind: str, number: int, form: Form | None) -> None:
        """Adds a call."""
        self.made.setdefault(key, MadeCall(kind, number, None)).forms.append(form)

    def ran(self, owner: str, kinds: Mapping[str, int]) -> None:
        """Adds the numbers of calls of a module that has run."""
        for kind, number in kinds.items():
            self.counted.setdefault((owner, kind), []).append(number)


def alike(run: MadeCalls, others: list[MadeCalls]) -> dict[Key, MadeCall]:
    """Returns the calls of a run that the other runs make too, in the same modules; none without another run."""
    found = {}
    for key, call in run.made.items():
        if all(key in other.made and _same_forms(call.forms, other.made[key].forms) for other in others):
            found[key] = call
    for (owner, _), call in found.items():
        counts = {n for one in (run, *others) for n in one.counted.get((owner, call.kind), ())}
        call.of = counts.pop() if len(counts) == 1 else None
    return found if others else {}


def _same_forms(ours: list[Form | None], theirs: list[Form | None]) -> bool:
    """Whether two runs made a call with the same arguments beside tensors: others hold values that depend on the images."""
    return len(ours) == len(theirs) and all(map(_same_form, ours, theirs))


def _same_form(a: Form | None, b: Form | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.kind is b.kind and _same_options(a.options, b.options)


def _same_options(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        same(v, b[k]) if isinstance(v, Tensor) or isinstance(b[k], Tensor) else v == b[k] for k, v in a.items()
    )
