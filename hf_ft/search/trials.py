"""A fixed list of jobs as an Optuna study: many processes may share it, and it may be stopped and resumed."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hf_ft.errors import OptionError
from hf_ft.search.claims import Claims, job_of, owners
from hf_ft.search.storage import MISSING, as_json, open_storage, open_study

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

_random = random.SystemRandom()  # evaluate may seed the global one, and forked workers share its state


@dataclass(frozen=True)
class Job:
    """What is evaluated once: a key, unique in the study, and parameters for Optuna's dashboards."""

    key: str
    params: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Halving:
    """Stop the worse jobs early: asynchronous successive halving (Li et al., ASHA, MLSys 2020).

    After step ``min_steps * factor**k`` a job goes on if it is among the best ``1/factor`` of those that came so far,
    or, while these are fewer than ``factor``, the best. So what is stopped depends on the order of the jobs.
    """

    min_steps: int = 1
    factor: int = 4


class Report(Protocol):
    """Tell an intermediate value; raises ``optuna.TrialPruned`` if the job is to stop. Steps count from 1."""

    def __call__(self, step: int, value: float) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """A finished job.

    Attributes:
        key: of the job.
        value: the score; of a pruned job the last one reported, nan if none was.
        pruned: whether it was stopped early.
        steps: reported values in the order of their steps.
        seconds: how long the evaluation took.
        info: what ``evaluate`` returned beside the value.
    """

    key: str
    value: float
    pruned: bool
    steps: tuple[float, ...]
    seconds: float
    info: Mapping[str, Any]


class JobError(RuntimeError):
    """A job failed again and again. The message names it, and its last error."""


Evaluate = Callable[[Job, Report], float | tuple[float, Mapping[str, Any]]]
Progress = Callable[[int, int, Outcome | None], None]


def run_trials(
    jobs: Sequence[Job],
    evaluate: Evaluate,
    *,
    storage: str | BaseStorage | None,
    name: str,
    signature: Mapping[str, Any],
    pruner: Halving | None = None,
    heartbeat: float = 10.0,
    retries: int = 2,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    deaths: int | None = None,
) -> dict[str, Outcome]:
    """Evaluate each job once, together with all processes that call this with the same storage and name.

    Finished jobs come from the storage. When this returns, every job is finished and none runs, unless ``stop`` said
    so. An exception of ``evaluate`` is raised at once; its job is free for the other workers, and for the next call.

    Args:
        jobs: in the order in which to start them; a later call may bring more.
        evaluate: gives a job's score, more is better, and if it likes a JSON dict to keep with it.
        storage: an open one; a path ``*.db`` or ``*.sqlite3``; a path ``*.log`` (Optuna's journal, for network file
            systems); a URL (``sqlite:///...``, ``mysql://...``, ``postgresql://...``, ``journal:///...``); None for
            memory only.
        name: of the study.
        signature: a JSON dict of what the scores depend on; the pruner is added. All callers must agree on it.
        pruner: None runs every job to its end.
        heartbeat: seconds between signs of life. A worker silent for six of them is taken for dead.
        retries: how often this call takes up a job that raised in other workers. The death of a worker does not
            count: it ends by itself, since each costs a worker.
        progress: called with (finished, all, None) first, then with each newly finished job, whoever ran it.
        stop: asked before each job: True leaves the rest for another call.
        deaths: give a job up when so many workers died in it; None for never.

    Returns:
        The outcomes by key, in the order of the jobs; without those that were left or given up.

    Raises:
        ImportError: Optuna is missing.
        OptionError: the storage cannot be opened, the study has another signature, or an argument cannot work.
        JobError: a job raised in other workers more than ``retries`` times; all the others are finished.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(MISSING) from error
    _check(jobs, pruner, heartbeat, retries)
    signature = as_json({"pruner": pruner and asdict(pruner), **signature}, "signature")
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        opened = open_storage(storage)
        study = open_study(opened, name, (pruner.min_steps, pruner.factor) if pruner else None)
        claims = Claims(opened, study, signature, heartbeat, [job.params for job in jobs])
        search = _Search({job.key: job for job in jobs}, evaluate, claims, retries, stop or (lambda: False), deaths)
        return search.run(progress or (lambda *_: None))
    finally:
        optuna.logging.set_verbosity(level)


@dataclass
class _Search:
    """One worker's way through the jobs."""

    jobs: Mapping[str, Job]
    evaluate: Evaluate
    claims: Claims
    retries: int
    stop: Callable[[], bool]
    deaths: int | None
    before: int = 0  # number of trials when this call began: only later errors count

    def run(self, tell: Progress) -> dict[str, Outcome]:
        trials = self.claims.read()
        self.before, done = len(trials), self.outcomes(trials)
        tell(len(done), len(self.jobs), None)
        pause, contested = 0.05, False
        while True:
            trials = self.claims.read()
            for key, outcome in self.outcomes(trials).items():
                if key not in done:
                    done[key] = outcome
                    tell(len(done), len(self.jobs), outcome)
            free = self.free(trials)
            if self.stop():
                return {key: done[key] for key in self.jobs if key in done}
            if free:
                # Workers that start together would meet again at every next job.
                contested = not self.work(_random.choice(free) if contested else free[0], trials)
                pause = 0.05
            elif any(trial.state.name == "RUNNING" and job_of(trial) in self.jobs for trial in trials):
                time.sleep(pause)
                pause = min(2 * pause, 2.0, self.claims.heartbeat)
            else:
                break
        self.raise_failed(done, trials)
        return {key: done[key] for key in self.jobs if key in done}

    def outcomes(self, trials: Sequence[FrozenTrial]) -> dict[str, Outcome]:
        return {
            key: _outcome(key, trial)
            for key, trial in owners(trials).items()
            if key in self.jobs and trial.state.is_finished()
        }

    def free(self, trials: Sequence[FrozenTrial]) -> list[Job]:
        taken, recent = owners(trials), trials[self.before :]
        errors = Counter(job_of(trial) for trial in recent if trial.user_attrs.get("failure") == "error")
        died = Counter(job_of(trial) for trial in trials if trial.user_attrs.get("failure") == "worker died")
        most = math.inf if self.deaths is None else self.deaths
        return [
            job
            for key, job in self.jobs.items()
            if key not in taken and errors[key] <= self.retries and died[key] < most
        ]

    def raise_failed(self, done: Mapping[str, Outcome], trials: Sequence[FrozenTrial]) -> None:
        for trial in reversed(trials):
            key = job_of(trial)
            if key in self.jobs and key not in done and trial.user_attrs.get("failure") == "error":
                raise JobError(
                    f"job {key!r} failed in other workers, at last with {trial.user_attrs['message']!r}. Mend it and "
                    "start again: what is finished is kept."
                )

    def work(self, job: Job, trials: Sequence[FrozenTrial]) -> bool:
        """Claim a job and evaluate it; False if another worker owns it."""
        import optuna

        trial_id = self.claims.claim(job.key, job.params, trials)
        if trial_id is None:
            return False
        began = time.perf_counter()
        with self.claims.beating(trial_id):
            try:
                state, value, info = self.perform(job, trial_id)
                seconds = round(time.perf_counter() - began, 3)
                self.claims.finish(trial_id, state, value, seconds=seconds, info=info)
            except BaseException as error:
                failure = "error" if isinstance(error, Exception) else "interrupted"
                message = f"{type(error).__name__}: {error}"
                failed = self.claims.finish(trial_id, "FAIL", failure=failure, message=message)
                # We were taken for dead, and a report was refused: go on with another job.
                if failed or not isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                    raise
        return True

    def perform(self, job: Job, trial_id: int) -> tuple[str, float | None, dict[str, Any]]:
        import optuna

        trial = optuna.trial.Trial(self.claims.study, trial_id)
        last: float | None = None

        def report(step: int, value: float) -> None:
            nonlocal last
            trial.report(float(value), int(step))
            last = None if math.isnan(value) else float(value)
            if trial.should_prune():
                raise optuna.TrialPruned(f"{job.key} after step {step}")

        try:
            returned = self.evaluate(job, report)
        except optuna.TrialPruned:
            return "PRUNED", last, {}
        value, info = returned if isinstance(returned, tuple) else (returned, {})
        if math.isnan(float(value)):
            raise ValueError(f"evaluate returned nan for job {job.key!r}: return -inf for one that diverged.")
        return "COMPLETE", float(value), as_json(info, f"info of job {job.key!r}")


def _outcome(key: str, trial: FrozenTrial) -> Outcome:
    return Outcome(
        key,
        math.nan if trial.value is None else trial.value,
        trial.state.name == "PRUNED",
        tuple(value for _, value in sorted(trial.intermediate_values.items())),
        trial.user_attrs["seconds"],
        trial.user_attrs["info"],
    )


def _check(jobs: Sequence[Job], pruner: Halving | None, heartbeat: float, retries: int) -> None:
    twice = [key for key, count in Counter(job.key for job in jobs).items() if count > 1]
    if twice:
        raise OptionError(f"jobs: the keys {twice} occur twice. Give each job its own.")
    if not (math.isfinite(heartbeat) and heartbeat > 0):
        raise OptionError(f"heartbeat={heartbeat!r} lies outside (0, inf). Default: 10.0.")
    if retries < 0:
        raise OptionError(f"retries={retries!r} lies outside [0, inf). Default: 2.")
    if pruner and (pruner.min_steps < 1 or pruner.factor < 2):
        raise OptionError(f"{pruner}: min_steps must be 1 or more, factor 2 or more.")
