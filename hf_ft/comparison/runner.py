"""The course of a comparison: equal tuning budgets, then final runs, as jobs that workers share.

Each strategy first trains once with its defaults; that also tells what it costs. The budget is the computing that
``trials`` such trainings of full fine-tuning take, and every strategy gets as many trials as fit into it, what it
spent on looking at the data taken off. All trials' settings are known beforehand, so that any number of workers,
interrupted or not, makes the same trainings. The best trial by validation is trained anew with each seed, and only
these runs look at the test sets.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers.utils import logging

from hf_ft.comparison.contenders import Entrant
from hf_ft.comparison.folder import Kept
from hf_ft.comparison.ledger import DIGITS, TUNING_SEED, Done, _done
from hf_ft.comparison.results import Training
from hf_ft.comparison.settings import Settings
from hf_ft.comparison.training import Measured, Recipe, train, versions
from hf_ft.errors import AnatomyError, OptionError
from hf_ft.search.trials import Job, Outcome, Report, run_trials

STORAGE = "compare.db"
REFUSED = (OptionError, AnatomyError)
DEATHS = 2  # of processes in one training, after which it counts as failed
DIED = f"its process died {DEATHS} times in it: was there not enough memory?"
logger = logging.get_logger(__name__)
Tell = Callable[[str], None]


class Judge:
    """Runs a comparison.

    Args:
        entrants: full fine-tuning first.
        settings: budget and fairness.
        recipe: how all train.
        folder: for results, models and states; workers share it.
        signature: what the scores depend on, beside the contenders.
        tell: told in a line what happens.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        settings: Settings,
        recipe: Recipe,
        folder: Path,
        signature: Mapping[str, Any],
        tell: Tell = lambda line: None,
    ) -> None:
        self.entrants, self.settings, self.recipe, self.folder = tuple(entrants), settings, recipe, folder
        self.signature, self.tell, self.kept = signature, tell, Kept(folder)
        self.done: dict[str, Done] = {}
        self._deadline = math.inf if settings.hours is None else time.monotonic() + 3600 * settings.hours

    def run(self) -> None:
        """Do all trainings that are not done yet, or as many as the time allows."""
        # Each training collects garbage, and would look at every object of every imported module for that.
        gc.collect()
        gc.freeze()
        try:
            self._warm_up()
            self._run()
        finally:
            gc.unfreeze()

    def _run(self) -> None:
        everything = [list(self.entrants)]
        # Under a time budget one contender after the other, so that what is there when it is up can be compared. When
        # it is up, the loop goes on and only reads what is done.
        for wave in everything if self.settings.hours is None else [[entrant] for entrant in self.entrants]:
            self._perform([(entrant, "trial", 0) for entrant in wave])
            if not self.allowed_seconds:  # the baseline's first trial failed: its others tell what a training costs
                self._perform([(self.entrants[0], "trial", i) for i in range(1, self.settings.trials)])
            self._perform([(e, "trial", i) for e in wave for i in range(1, self.trials_of(e))])
            seeds = range(1, self.settings.seeds + 1)
            self._perform([(e, "run", seed) for e in wave if self.chosen(e) is not None for seed in seeds])

    def _warm_up(self) -> None:
        """A few steps that count for nothing: a process's first training is slower, and costs are measured."""
        short = dataclasses.replace(self.recipe, arguments={**self.recipe.arguments, "max_steps": 3})
        first = self.entrants[0]
        with suppress(Exception):  # what is wrong is told by the trainings
            train(first, self._settings_of(first)[0], TUNING_SEED, short, self.kept.work("warm-up"))

    # --- budgets -------------------------------------------------------------------------------------------

    @property
    def allowed_seconds(self) -> float:
        """The tuning budget of each contender; 0 while it is not known, or if full fine-tuning always failed."""
        trials = (self.trial(self.entrants[0], number) for number in range(self.settings.trials))
        costs = (trial.training.compute for trial in trials if trial is not None and not trial.training.error)
        return self.settings.trials * next(costs, 0.0)

    def trials_of(self, entrant: Entrant) -> int:
        """How many trials fit into the budget: at least the first, by whose cost this goes."""
        first = self.trial(entrant, 0)
        if first is None or first.refused:
            return 1
        # A first trial that failed may do better elsewhere, and tells no cost.
        if entrant is self.entrants[0] or first.training.error or not self.allowed_seconds:
            return self.settings.trials
        left = self.allowed_seconds - first.measured_compute
        fitting = int(left / first.training.compute + 1e-9)
        return max(1, min(fitting, self.settings.trials * self.settings.most_trials))

    def chosen(self, entrant: Entrant) -> int | None:
        """The trial with the best score; None while trials are missing, or if all failed.

        With few validation samples many are equal: of these the one that was better over the later half of its epochs
        counts, and then the first.
        """
        trials = [self.trial(entrant, number) for number in range(self.trials_of(entrant))]
        if any(trial is None for trial in trials):
            return None
        scored = [(i, t.training) for i, t in enumerate(trials) if t and t.training.validation is not None]
        ranks = [(self._score(training), self._late(training), -i) for i, training in scored]
        return -max(ranks)[-1] if ranks else None

    def _score(self, training: Training) -> float:
        """The metric, more being better."""
        value = -math.inf if training.validation is None else training.validation
        return value if self.recipe.greater_is_better or training.validation is None else -value

    def _late(self, training: Training) -> float:
        """The mean score over the later half of the epochs, more being better."""
        late = [point["validation"] for point in training.curve[len(training.curve) // 2 :]]
        mean = fmean(late) if late else -math.inf
        return mean if self.recipe.greater_is_better else -mean

    # --- jobs ----------------------------------------------------------------------------------------------

    def trial(self, entrant: Entrant, number: int) -> Done | None:
        """A trial, if it is done."""
        return self.done.get(self._key(entrant, "trial", number))

    def final(self, entrant: Entrant, seed: int) -> Done | None:
        """A final run, if it is done."""
        return None if self.chosen(entrant) is None else self.done.get(self._key(entrant, "run", seed))

    def _settings_of(self, entrant: Entrant) -> list[dict[str, Any]]:
        most = self.settings.trials * self.settings.most_trials
        optim = self.recipe.arguments["optim"]
        return entrant.settings(most, self.settings.first_rate(optim), self.settings.sampling_seed)

    def _values(self, entrant: Entrant, kind: str, number: int) -> dict[str, Any]:
        chosen = number if kind == "trial" else self.chosen(entrant)
        assert chosen is not None
        return self._settings_of(entrant)[chosen]

    def _key(self, entrant: Entrant, kind: str, number: int) -> str:
        seed = TUNING_SEED if kind == "trial" else number
        return entrant.key(f"{kind} {number}", self._values(entrant, kind, number), seed)

    def _perform(self, wanted: Sequence[tuple[Entrant, str, int]]) -> None:
        jobs, what = [], {}
        for entrant, kind, number in wanted:
            key = self._key(entrant, kind, number)
            what[key] = (entrant, kind, number)
            shown = {k: v for k, v in self._values(entrant, kind, number).items() if v is not None}
            jobs.append(Job(key, {"strategy": entrant.name, "kind": kind, **shown}))

        def evaluate(job: Job, report: Report) -> tuple[float, dict[str, Any]]:
            return self._evaluate(*what[job.key])

        def progress(finished: int, all_jobs: int, outcome: Outcome | None) -> None:
            if outcome is not None:
                self._told(finished, all_jobs, *what[outcome.key], _done(outcome))

        outcomes = run_trials(
            jobs,
            evaluate,
            deaths=DEATHS,
            storage=self.settings.storage or str(self.folder / STORAGE),
            name=self.settings.study_name,
            signature=self.signature,
            progress=progress,
            stop=lambda: time.monotonic() >= self._deadline,
        )
        self.done |= {key: _done(outcome) for key, outcome in outcomes.items()}
        if time.monotonic() < self._deadline:
            for key in what.keys() - outcomes.keys():
                entrant, kind, number = what[key]
                self.done[key] = Done(self._failed(entrant, kind, number, DIED), 0.0)

    def _evaluate(self, entrant: Entrant, kind: str, number: int) -> tuple[float, dict[str, Any]]:
        values = self._values(entrant, kind, number)
        seed = TUNING_SEED if kind == "trial" else number
        name = entrant.file_name(values)
        save_to = None if kind == "trial" else self.kept.model(name, seed)
        info: dict[str, Any] = {"refused": False, "measured_compute": 0.0, "found": {}, "learned": ""}

        def on_measured(measured: Measured) -> None:
            if entrant.looks:
                self.kept.keep_states(entrant.file_name(), measured.states)
                info.update(measured_compute=measured.compute, **_findings(entrant, measured))

        try:
            if entrant.refusal:
                raise OptionError(entrant.refusal)
            known = None if kind == "trial" and number == 0 else self._measured(entrant)
            work = self.kept.work(f"{name}-{kind}-{number}")
            training = train(entrant, values, seed, self.recipe, work, known, save_to, on_measured)
            if kind == "run":
                self.kept.keep_best(name, seed, self._score(training))
        except Exception as error:  # one training that fails ends neither the others nor the comparison
            logger.info(f"{entrant.name}: {error}", exc_info=True)
            refused = isinstance(error, REFUSED)
            training = self._failed(
                entrant, kind, number, str(error) if refused else f"{type(error).__name__}: {error}"
            )
            info["refused"] = refused
        return self._score(training), {"training": dataclasses.asdict(training), **info}

    def _failed(self, entrant: Entrant, kind: str, number: int, error: str) -> Training:
        seed = TUNING_SEED if kind == "trial" else number
        return Training(seed, self._values(entrant, kind, number), None, error=error, versions=versions())

    def _measured(self, entrant: Entrant) -> Measured | None:
        """What the contender measured in its first trial, which serves all its trainings; None if it is lost."""
        states = self.kept.states(entrant.file_name()) if entrant.looks else {}
        return None if states is None else Measured(states, 0.0)

    def _told(self, finished: int, all_jobs: int, entrant: Entrant, kind: str, number: int, done: Done) -> None:
        training = done.training
        named = ", ".join(f"{k.partition('.')[2] or 'lr'} {_short(v)}" for k, v in training.params.items())
        what = f"trial {number + 1}" if kind == "trial" else f"seed {number}"
        score = training.error or f"{self.recipe.metric} {training.validation:.3f}"
        self.tell(f"[{finished}/{all_jobs}] {entrant.name} {what} ({named}): {score}, {done.seconds:.0f} s")

    def runs(self, entrant: Entrant) -> list[Training]:
        """The final runs that are done."""
        found = (self.final(entrant, seed) for seed in range(1, self.settings.seeds + 1))
        return [done.training for done in found if done is not None]

    # --- the winner ----------------------------------------------------------------------------------------

    def winner(self) -> tuple[Entrant, Training] | None:
        """The contender with the best mean validation score over its final runs, and its best run by validation.

        Of equals, the one that was better over the later half of its epochs counts, and then the first.
        """
        ranks = []
        for place, entrant in enumerate(self.entrants):
            runs = [run for run in self.runs(entrant) if not run.error]
            if len(runs) == self.settings.seeds:
                best = max(runs, key=lambda run: (self._score(run), -run.seed))
                scores, late = ([of(run) for run in runs] for of in (self._score, self._late))
                ranks.append((round(fmean(scores), DIGITS), round(fmean(late), DIGITS), -place, entrant, best))
        return max(ranks, key=lambda rank: rank[:3])[3:] if ranks else None

    def save_winner(self) -> Path | None:
        """Put the winner's model into ``best``, made again if it was not kept; None where nothing has won."""
        found = self.winner()
        if found is None:
            return None
        entrant, run = found
        name = entrant.file_name(run.params)
        with self.kept.locked():
            if not self.kept.has_model(name, run.seed):
                work, saved = self.kept.work("winner"), self.kept.model(name, run.seed)
                again = train(entrant, run.params, run.seed, self.recipe, work, self._measured(entrant), saved)
                if again.validation != run.validation:
                    what = f"{again.validation:.3f} on validation in place of {run.validation:.3f}"
                    logger.warning(f"the winner had to be trained again, and has {what}: trainings do not repeat here.")
            best = self.kept.crown(name, run.seed)
            if self.complete:
                self.kept.clear()
        return best

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train."""
        wanted = [e for e in self.entrants if self.chosen(e) is not None]
        tried = all(self.trial(e, i) is not None for e in self.entrants for i in range(self.trials_of(e)))
        return tried and all(len(self.runs(e)) == self.settings.seeds for e in wanted)


def _findings(entrant: Entrant, measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {}
    learned = []
    for config in entrant.configs:
        state = measured.states.get(config.ft_type)
        if state is not None:
            found |= dict(state.info)
            learned.append(config.findings(state).summary)
    return {"found": found, "learned": " ".join(filter(None, learned))}


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
