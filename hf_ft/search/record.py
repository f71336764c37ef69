"""The state of a study's jobs according to its trials, kept up to date at a cost that does not grow with the study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

INSTEAD = "instead_of"  # user attribute: number of the trial that a trial repeats


def job_of(trial: FrozenTrial) -> str | None:
    """The key of a trial's job."""
    return trial.user_attrs.get("job")


@dataclass
class Record:
    """The trials of a study as last read.

    Attributes:
        trials: all trials, by number.
        unfinished: numbers of the trials that were not finished.
        distributions: the first distribution of each parameter, which Optuna requires the others to resemble.
    """

    trials: Sequence[FrozenTrial] = ()
    unfinished: set[int] = field(default_factory=set)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    _finished: list[str] = field(default_factory=list)  # jobs
    _numbers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by job
    _failures: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))  # by job and reason

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Take over all trials; only new ones and those that were unfinished are examined."""
        known, self.trials = len(self.trials), trials
        for trial in trials[known:]:
            self._add(trial)
        for number in sorted(self.unfinished):
            if trials[number].state.is_finished():
                self._finish(number)

    def news(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The trials that are new, and those that were unfinished."""
        return [*(trials[number] for number in sorted(self.unfinished)), *trials[len(self.trials) :]]

    def take_finished(self) -> list[str]:
        """The jobs of trials that have finished since the last call."""
        taken, self._finished = self._finished, []
        return taken

    def _add(self, trial: FrozenTrial) -> None:
        self.unfinished.add(trial.number)
        job = job_of(trial)
        if job is not None:
            self._numbers[job].append(trial.number)
        for name, distribution in trial.distributions.items():
            self.distributions.setdefault(name, distribution)

    def _finish(self, number: int) -> None:
        self.unfinished.discard(number)
        trial = self.trials[number]
        job = job_of(trial)
        if job is None:
            return
        self._finished.append(job)
        if "failure" in trial.user_attrs:
            self._failures[job, trial.user_attrs["failure"]].append(number)

    def owner(self, job: str) -> FrozenTrial | None:
        """The owner of a job: the trial with the lowest number among those that have not failed.

        A trial that another one repeats no longer counts, unless that one failed.
        """
        trials = [self.trials[number] for number in self._numbers.get(job, ())]
        valid = [trial for trial in trials if trial.state.name != "FAIL"]
        repeated = {trial.user_attrs.get(INSTEAD) for trial in valid}
        return next((trial for trial in valid if trial.number not in repeated), None)

    def failures(self, job: str, reason: str, since: int = 0) -> int:
        """How many trials of a job failed for a reason, from a trial's number on."""
        return sum(number >= since for number in self._failures.get((job, reason), ()))

    def running(self) -> list[FrozenTrial]:
        """The trials of jobs that were running."""
        trials = (self.trials[number] for number in sorted(self.unfinished))
        return [trial for trial in trials if trial.state.name == "RUNNING" and job_of(trial) is not None]
