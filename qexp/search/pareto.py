"""The Pareto front of accuracy, size and bit operations, by an evolutionary search with Optuna."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.errors import QexpError, near
from qexp.layers.swap import evaluating
from qexp.recipe.plan import Plan
from qexp.results.judging import Judge
from qexp.search.allocate import Allocate
from qexp.search.assign import assign
from qexp.search.budget import spent
from qexp.search.context import SearchContext
from qexp.search.quantizers_by_width import Key, QuantizersByWidth
from qexp.search.sensitivity import Comparison
from qexp.system.whole_files import write_text

log = logging.getLogger(__name__)
COSTS = ("weight_bytes", "bops")
GOALS = ("value", "agree", "divergence")


class Pareto(Allocate):
    """Searches plans that no other plan beats in accuracy, size and bit operations at once.

    Each trial gives every tensor a width and scores the network on held-out training images. The first trials are the uniform plans and the
    best ones under their budgets (see `Allocate`); NSGA-II derives further plans from them. An Optuna storage holds the trials: an
    interrupted search resumes, and several processes with the same storage work on one front.

    It writes `pareto.csv` (one row per trial: accuracy, costs, `front`, and one column per tensor) and `front/<nn>/layers.csv`, each a plan
    that `plan=` reads, from the smallest to the largest. The run continues with the most accurate plan of the front within the budget.

    Args:
        widths, sites, layers, images, memory_mb, budget, hessian, probes: See `Allocate`.
        trials: Number of plans to score in all, including those of an earlier interrupted search.
        goal: The score: `value` (the task's own score), `agree` with the float network, or `divergence` from it.
        storage: An Optuna storage URL (SQLite, PostgreSQL, ...); null keeps `pareto.db` in the run folder.
        score_images: Images per trial.
    """

    name = "pareto"

    def __init__(
        self,
        trials: int = 100,
        goal: str = "agree",
        storage: str | None = None,
        score_images: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if goal not in GOALS:
            raise QexpError(f"search.goal={goal!r} is not allowed{near(goal, GOALS)}; use {', '.join(GOALS)}")
        if trials < 1:
            raise QexpError(f"search.trials={trials} is not allowed; use 1 or more")
        self.trials, self.goal, self.storage, self.score_images = trials, goal, storage, score_images

    def __call__(self, setting: SearchContext) -> Plan:
        shelf = self.shelf(setting)
        table = self.table(setting, shelf)
        with self._study(setting, shelf) as study:
            for choice in self._first(setting, shelf, table) if not study.trials else ():
                study.enqueue_trial({_name(key): bits for key, bits in choice.items()}, skip_if_exists=True)
            self._run(setting, shelf, study)
            trials = self.frame(study, shelf, setting)
        setting.write("pareto.csv", trials)
        self._write_front(setting, shelf, trials)
        choice = self._pick(setting, shelf, trials)
        shelf.take(choice)
        shelf.close()
        return shelf.plan_of(choice, f"search.{self.name}")

    @contextmanager
    def _study(self, setting: SearchContext, shelf: QuantizersByWidth) -> Iterator[Any]:
        """Yields the study of the trials; its connections to the storage are closed at the end."""
        try:
            import optuna
        except ImportError:
            raise QexpError("search=pareto needs optuna, which is not installed: pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        content = [[*key] for key in self.keys(shelf)] + [shelf.widths, self.goal, self.score_images, setting.seed]
        shape = hashlib.sha256(json.dumps([content, setting.folder.name], default=str).encode()).hexdigest()[:16]
        url = self.storage or f"sqlite:///{Path(setting.folder).resolve() / 'pareto.db'}"
        storage = optuna.storages.RDBStorage(url)
        try:
            yield optuna.create_study(
                study_name=f"qexp-{shape}",
                storage=storage,
                directions=["minimize" if self._less_is_better(setting) else "maximize", "minimize", "minimize"],
                sampler=optuna.samplers.NSGAIISampler(population_size=24, seed=setting.seed),
                load_if_exists=True,
            )
        finally:
            storage.remove_session()
            storage.engine.dispose()  # else a process of many searches holds many open files

    def _less_is_better(self, setting: SearchContext) -> bool:
        """Whether plans with less of the goal are better."""
        of_task = setting.judge is not None and not setting.judge.measure.higher_is_better
        return self.goal == "divergence" or (self.goal == "value" and of_task)

    def _first(self, setting: SearchContext, shelf: QuantizersByWidth, table: pd.DataFrame) -> list[dict[Key, int]]:
        """Returns the uniform plans and the best plans by summed sensitivity at their costs and half-way between."""
        keys, costs = self.keys(shelf), setting.costs
        uniform = [dict.fromkeys(keys, bits) for bits in shelf.widths]
        prices = []
        for choice in uniform:
            wbits, abits = _by_site({**setting.fixed, **choice})
            prices.append({kind: spent(kind, wbits, abits, costs) for kind in COSTS})
        between = [{kind: (a[kind] * b[kind]) ** 0.5 for kind in COSTS} for a, b in itertools.pairwise(prices)]
        best = [assign(table, setting.fixed, costs, bounds) for bounds in [*prices, *between]]
        return [*best, *uniform]

    def _run(self, setting: SearchContext, shelf: QuantizersByWidth, study: Any) -> None:
        batches, costs, keys = setting.first(self.score_images), setting.costs, self.keys(shelf)
        targets = _outputs(shelf, batches)

        def objective(trial: Any) -> tuple[float, float, float]:
            choice = {key: trial.suggest_categorical(_name(key), shelf.widths) for key in keys}
            shelf.take(choice)
            row = _compared(setting.judge, shelf, batches, targets)
            if row[self.goal] is None:
                raise QexpError(
                    f"search.goal={self.goal} is not allowed: {type(setting.judge).__name__} "
                    f"{'decides nothing per image' if self.goal == 'agree' else 'cannot judge outputs alone'}; use divergence"
                )
            wbits, abits = _by_site({**setting.fixed, **choice})
            return row[self.goal], *(spent(kind, wbits, abits, costs) for kind in COSTS)

        done = _complete(study)
        with (
            evaluating(shelf.model),
            tqdm(total=self.trials, initial=done, desc="pareto", unit="plan", disable=not setting.progress) as bar,
        ):
            while _complete(study) < self.trials:
                study.optimize(objective, n_trials=1)
                bar.update()

    def frame(self, study: Any, shelf: QuantizersByWidth, setting: SearchContext) -> pd.DataFrame:
        """Returns one row per finished trial: score, costs, whether it is on the front, and every tensor's width."""
        import optuna

        best = {t.number for t in study.best_trials}
        rows = [
            {
                "trial": t.number,
                self.goal: t.values[0],
                **dict(zip(COSTS, t.values[1:])),
                "front": t.number in best,
                **t.params,
            }
            for t in study.get_trials(deepcopy=False)
            if t.state == optuna.trial.TrialState.COMPLETE
        ]
        return pd.DataFrame(rows)

    def _write_front(self, setting: SearchContext, shelf: QuantizersByWidth, trials: pd.DataFrame) -> None:
        front = trials[trials.front].sort_values(list(COSTS)).drop_duplicates([self.goal, *COSTS])
        for i, row in enumerate(front.to_dict("records")):
            folder = setting.folder / "front" / f"{i:02d}"
            plan = shelf.plan_of({key: int(row[_name(key)]) for key in self.keys(shelf)}, f"search.{self.name}")
            write_text(folder / "layers.csv", plan.frame().to_csv(index=False))
        setting.findings |= {"search": self.name, "search_trials": len(trials), "search_front": len(front)}
        log.info(
            "pareto: %d plans of %d are on the front; their tables: %s",
            len(front),
            len(trials),
            setting.folder / "front",
        )

    def _pick(self, setting: SearchContext, shelf: QuantizersByWidth, trials: pd.DataFrame) -> dict[Key, int]:
        """Returns the most accurate plan of the front within the budget; the cheapest if none is within it."""
        bounds = self.bounds(setting)
        within = trials[trials.front]
        for kind in COSTS:
            if kind in bounds and (within[kind] <= bounds[kind] * (1 + 1e-9)).any():
                within = within[within[kind] <= bounds[kind] * (1 + 1e-9)]
        best = within.sort_values([self.goal, *COSTS], ascending=[self._less_is_better(setting), True, True]).iloc[0]
        return {key: int(best[_name(key)]) for key in self.keys(shelf)}


def _complete(study: Any) -> int:
    """Returns the number of trials with a score; an interrupted trial has none."""
    return sum(t.state.name == "COMPLETE" for t in study.get_trials(deepcopy=False))


def _name(key: Key) -> str:
    return f"{key[0]}/{key[1]}"


def _by_site(widths: Mapping[Key, int]) -> tuple[dict[str, int], dict[str, int]]:
    return tuple({layer: b for (layer, s), b in widths.items() if s == site} for site in ("weight", "input"))


@torch.no_grad()
def _outputs(shelf: QuantizersByWidth, batches: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
    shelf.nothing()
    with evaluating(shelf.model):
        return [shelf.model(images) for images, _ in batches]


@torch.no_grad()
def _compared(
    judge: Judge | None, shelf: QuantizersByWidth, batches: Sequence[tuple[Tensor, Any]], wanted: Sequence[Tensor]
) -> dict[str, float | None]:
    found = Comparison(judge)
    for (images, targets), of_float in zip(batches, wanted):
        found.add(shelf.model(images), of_float, targets)
    return found.row()
