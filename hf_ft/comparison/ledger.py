"""The finished training runs of a comparison and what follows from them: budgets, the best trial, the winner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from hf_ft.comparison.contenders import Entrant
from hf_ft.comparison.results import Training
from hf_ft.comparison.settings import Settings
from hf_ft.records import restored
from hf_ft.search.trials import Outcome

TUNING_SEED = 0  # seeds of final runs start at 1, so that none of them is used for tuning
DIGITS = 9  # means that agree to this many digits are equal


@dataclass(frozen=True)
class Planned:
    """A training run of a comparison.

    Attributes:
        kind: "trial" or "run" (a final run).
        number: of the trial, from 0, or the seed of the run, from 1.
        setting: index of the values that it is trained with; those of the first trial are the defaults.
    """

    entrant: Entrant
    kind: str
    number: int
    setting: int

    @property
    def seed(self) -> int:
        return TUNING_SEED if self.kind == "trial" else self.number


@dataclass(frozen=True)
class Done:
    """A finished job: a training run and its further results.

    Attributes:
        measured_compute: compute seconds of the strategies' measurements.
        measured_work, work: work of the measurements and of training (:class:`hf_ft.engine.work.Work`); counted
            in the first trial of a contender only.
    """

    training: Training
    seconds: float
    refused: bool = False
    measured_compute: float = 0.0
    measured_work: float = 0.0
    work: float = 0.0
    found: Mapping[str, Any] = field(default_factory=dict)
    learned: str = ""


def done_from(outcome: Outcome) -> Done:
    """A finished job, from the storage.

    Raises:
        CheckpointError: if something in it is missing or of another type.
    """
    return restored(Done, {**outcome.info, "seconds": outcome.seconds}, "results of a training run")


class Ledger:
    """The finished training runs and what follows from them; it runs nothing itself.

    Args:
        entrants: the contenders, full fine-tuning first.
        settings: budget and shared settings.
        greater_is_better: whether higher values of the metric are better.
    """

    def __init__(self, entrants: Sequence[Entrant], settings: Settings, greater_is_better: bool) -> None:
        self.entrants, self.settings = tuple(entrants), settings
        self.greater_is_better = greater_is_better
        self.done: dict[str, Done] = {}

    @property
    def allowed(self) -> float:
        """The tuning budget of each contender, as work; 0 while it is unknown, or if full fine-tuning cannot run."""
        return self.settings.trials * self.work(self.entrants[0])

    def work(self, entrant: Entrant) -> float:
        """The work of a whole training run, from the first trial, which may have ended early; 0 if it is unknown."""
        first = self.trial(entrant, 0)
        return 0.0 if first is None or not first.training.share else first.work / first.training.share

    def used(self, entrant: Entrant, trials: int) -> float:
        """The work of the measurement and of the first trials; unfinished trials count as whole."""
        first = self.trial(entrant, 0)
        found = [self.trial(entrant, number) for number in range(trials)]
        shares = sum(1.0 if done is None else done.training.share for done in found)
        return (0.0 if first is None else first.measured_work) + shares * self.work(entrant)

    def trials_of(self, entrant: Entrant) -> int:
        """Number of trials that fit into the budget, at least one.

        The work that a diverged trial did not use goes to further trials once all are finished, so the number does not
        depend on their order.
        """
        if not self.settings.trials:
            return 0
        first = self.trial(entrant, 0)
        if first is None or first.refused:
            return 1
        each, most = self.work(entrant), len(self.settings_of(entrant))
        if not each or not self.allowed:  # a failed first trial does not say what others cost
            return min(self.settings.trials, most)
        count = min(most, self._fitting(first.measured_work, each, 0))
        while count < most and all(self.trial(entrant, number) is not None for number in range(count)):
            more = self._fitting(self.used(entrant, count), each, count)
            if more <= count:
                break
            count = min(most, more)
        return count

    def _fitting(self, used: float, each: float, done: int) -> int:
        """Number of trials, given those that are done and the work that they used."""
        return max(1, done + math.floor((self.allowed - used) / each + 1e-9))

    def best_trial(self, entrant: Entrant) -> int | None:
        """The trial with the best score; None while trials are missing, or if all failed. Without tuning: the defaults.

        Ties, common on small validation sets, are broken by the score over the later half of the epochs, then by order.
        """
        if not self.settings.trials:
            return 0
        trials = [self.trial(entrant, number) for number in range(self.trials_of(entrant))]
        if any(trial is None for trial in trials):
            return None
        scored = [(i, t.training) for i, t in enumerate(trials) if t and t.training.validation is not None]
        ranks = [(round(self.score(t), DIGITS), round(self._late(t), DIGITS), -i) for i, t in scored]
        return -max(ranks)[-1] if ranks else None

    def confirming(self, entrant: Entrant) -> list[Planned]:
        """The runs that decide between the best trial and the defaults; none if these are the same.

        The best of several trials is best partly by chance, so its score is not what to expect of the next run.
        """
        best = self.best_trial(entrant)
        seeds = range(1, self.settings.confirming_seeds + 1)
        return [Planned(entrant, "run", seed, setting) for setting in (best, 0) for seed in seeds] if best else []

    def chosen(self, entrant: Entrant) -> int | None:
        """The setting of the final runs: the best trial's, or the defaults if these score higher with other seeds.

        None while it is unknown, or if all trials failed.
        """
        halves = self.confirmed(entrant)
        if halves is None:
            return None
        best, defaults = halves
        return 0 if best and self._mean(defaults) > self._mean(best) else self.best_trial(entrant)

    def confirmed(self, entrant: Entrant) -> tuple[list[Training], list[Training]] | None:
        """The runs that decide: of the best trial's setting, and of the defaults; None while any is missing."""
        found = [self.done.get(self.key(run)) for run in self.confirming(entrant)]
        runs = [done.training for done in found if done is not None]
        half = len(found) // 2
        return (runs[:half], runs[half:]) if len(runs) == len(found) else None

    def rejected(self, entrant: Entrant) -> list[Training]:
        """The runs of the setting that was not chosen; none before the choice."""
        best, defaults = self.confirmed(entrant) or ([], [])
        return best if self.chosen(entrant) == 0 else defaults

    def _mean(self, runs: Sequence[Training]) -> tuple[float, float]:
        """Their mean score, and that over the later half of the epochs, which decides between equal means."""
        return round(fmean(map(self.score, runs)), DIGITS), round(fmean(map(self._late, runs)), DIGITS)

    def score(self, training: Training) -> float:
        """The metric with a sign such that higher is better."""
        value = -math.inf if training.validation is None else training.validation
        return value if self.greater_is_better or training.validation is None else -value

    def _late(self, training: Training) -> float:
        """Mean score over the later half of the epochs; higher is better."""
        late = [point["validation"] for point in training.curve[len(training.curve) // 2 :]]
        mean = fmean(late) if late else -math.inf
        return mean if self.greater_is_better else -mean

    def trial(self, entrant: Entrant, number: int) -> Done | None:
        """A trial, if it is finished."""
        return self.done.get(self.key(Planned(entrant, "trial", number, number)))

    def first(self, entrant: Entrant) -> Done | None:
        """Its first training run, in which its strategies measure the data, if it is finished."""
        return self.trial(entrant, 0) if self.settings.trials else self.final(entrant, 1)

    def final(self, entrant: Entrant, seed: int) -> Done | None:
        """A final run, if it is finished."""
        chosen = self.chosen(entrant)
        return None if chosen is None else self.done.get(self.key(Planned(entrant, "run", seed, chosen)))

    def settings_of(self, entrant: Entrant) -> list[dict[str, Any]]:
        most = max(1, self.settings.trials * self.settings.most_trials)
        return entrant.settings(most, self.settings.sampling_seed)

    def values(self, planned: Planned) -> dict[str, Any]:
        return self.settings_of(planned.entrant)[planned.setting]

    def key(self, planned: Planned) -> str:
        return planned.entrant.key(f"{planned.kind} {planned.number}", self.values(planned), planned.seed)

    def runs(self, entrant: Entrant) -> list[Training]:
        """The finished final runs."""
        found = (self.final(entrant, seed) for seed in range(1, self.settings.seeds + 1))
        return [done.training for done in found if done is not None]

    def winner(self) -> tuple[Entrant, Training] | None:
        """The contender with the best mean validation score over its final runs, and its best run by validation.

        Ties are broken by the score over the later half of the epochs, then by order.
        """
        ranks = []
        for place, entrant in enumerate(self.entrants):
            runs = [run for run in self.runs(entrant) if not run.error]
            if len(runs) == self.settings.seeds:
                best = max(runs, key=lambda run: (self.score(run), -run.seed))
                ranks.append((self._mean(runs), -place, entrant, best))
        return max(ranks, key=lambda rank: rank[:2])[2:] if ranks else None

    @property
    def complete(self) -> bool:
        """Whether all training runs are finished."""
        wanted = [e for e in self.entrants if self.best_trial(e) is not None]
        tried = all(self.trial(e, i) is not None for e in self.entrants for i in range(self.trials_of(e)))
        return tried and all(len(self.runs(e)) == self.settings.seeds for e in wanted)
