"""Evaluate a fixed list of jobs as an Optuna study that processes can share and that can be stopped and resumed."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hf_ft.errors import OptionError
from hf_ft.search.claims import Claims
from hf_ft.search.record import job_of
from hf_ft.search.storage import MISSING, UnavailableError, open_storage, reachable
from hf_ft.search.study import as_json, open_study

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

FRESH = 0.5  # seconds for which trials, once read, may be used to choose a job: claiming it reads them again
_random = random.SystemRandom()  # evaluate may seed the global RNG, and forked workers share its state


@dataclass(frozen=True)
class Job:
    """A unit of evaluation: a key, unique in the study, and parameters for Optuna's dashboards."""

    key: str
    params: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Halving:
    """Stop poor jobs early by asynchronous successive halving (Li et al., ASHA, MLSys 2020).

    After step ``min_steps * factor**k`` a job continues if it is among the best ``1/factor`` of those that have reached
    that step, or, while there are fewer than ``factor``, if it is the best. Pruning therefore depends on job order.
    """

    min_steps: int = 1
    factor: int = 4


class Report(Protocol):
    """Report an intermediate value; raise ``optuna.TrialPruned`` if the job is to stop. Steps count from 1."""

    def __call__(self, step: int, value: float) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """A finished job.

    Attributes:
        key: key of the job.
        value: the score; for a pruned job the last reported value, NaN if there is none.
        pruned: whether it was stopped early.
        steps: reported values in step order.
        seconds: duration of the evaluation.
        info: the dict that ``evaluate`` returned along with the score.
    """

    key: str
    value: float
    pruned: bool
    steps: tuple[float, ...]
    seconds: float
    info: Mapping[str, Any]


class JobError(RuntimeError):
    """A job failed repeatedly. The message names it and its last error."""


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
    again: Callable[[Outcome], bool] | None = None,
) -> dict[str, Outcome]:
    """Evaluate each job once, together with all processes that use the same storage and study name.

    Finished jobs are read from the storage. On return, every job is finished and none is running, unless ``stop``
    ended the search early. An exception in ``evaluate`` is raised immediately; its job stays free for other workers
    and later calls.

    Args:
        jobs: jobs in starting order; a later call may add more.
        evaluate: returns a job's score (higher is better), optionally with a JSON dict to store with it.
        storage: an open storage; a path ``*.db`` or ``*.sqlite3``; a path ``*.log`` (Optuna's journal, for network
            file systems); a URL (``sqlite:///...``, ``mysql://...``, ``postgresql://...``, ``journal:///...``,
            ``grpc://host:port``); None for memory only.
        name: name of the study.
        signature: a JSON dict of everything the scores depend on; the pruner is added. All callers must agree on it.
        pruner: None runs every job to completion.
        heartbeat: seconds between heartbeats. A worker that misses six of them is presumed dead; one on the same
            machine whose process is gone is known to be.
        retries: how often this call retries a job that raised in other workers. The death of a worker does not count,
            since each death costs a worker.
        progress: called with (finished, total, None) first, then with each newly finished job, whoever ran it.
        stop: called before each job; True leaves the remaining jobs to another call.
        deaths: give up on a job after this many workers died in it; None for never.
        again: whether to evaluate again a job that was finished, or given up, before this call.

    Returns:
        Outcomes by key, in job order, without jobs that were left or given up.

    Raises:
        ImportError: if Optuna is not installed.
        OptionError: if the storage cannot be opened or stays locked, the study has another signature, or an argument
            is invalid.
        JobError: if a job raised in other workers more than ``retries`` times; all other jobs are finished.
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
        backend = open_storage(storage)
        with reachable(backend):
            study = open_study(backend, name, (pruner.min_steps, pruner.factor) if pruner else None)
            claims = Claims(backend, study, signature, heartbeat, [job.params for job in jobs])
            search = _Search(
                {job.key: job for job in jobs}, evaluate, claims, retries, stop or (lambda: False), deaths, again
            )
            return search.run(progress or (lambda *_: None))
    finally:
        optuna.logging.set_verbosity(level)


@dataclass
class _Search:
    """The work of one worker on the jobs."""

    jobs: Mapping[str, Job]
    evaluate: Evaluate
    claims: Claims
    retries: int
    stop: Callable[[], bool]
    deaths: int | None
    again: Callable[[Outcome], bool] | None
    before: int = 0  # number of trials at the start of this call: only later errors count
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    waiting: dict[str, Job] = field(default_factory=dict)  # jobs without an outcome

    def run(self, tell: Progress) -> dict[str, Outcome]:
        self.waiting = dict(self.jobs)
        self.before = len(self.claims.read().trials)
        self.collect(lambda *_: None)
        tell(len(self.outcomes), len(self.jobs), None)
        pause, contested, fresh = 0.05, False, False
        while True:
            if not fresh:
                self.claims.read()
            self.collect(tell)
            if self.stop():
                self.claims.read()
                self.collect(tell)
                return self.in_order()
            job = self.next_free(contested)
            if job is not None:
                # Workers that start together would collide again at every following job.
                contested = not self.work(job)
                pause, fresh = 0.05, not contested and time.monotonic() - self.claims.read_at < FRESH
            elif fresh:
                fresh = False
            elif any(job_of(trial) in self.jobs for trial in self.claims.record.running()):
                time.sleep(pause)
                pause = min(2 * pause, 2.0, self.claims.heartbeat)
            else:
                break
        self.raise_failed()
        return self.in_order()

    def in_order(self) -> dict[str, Outcome]:
        return {key: self.outcomes[key] for key in self.jobs if key in self.outcomes}

    def collect(self, tell: Progress) -> None:
        """Take over the outcomes of jobs whose trials have finished."""
        record = self.claims.record
        for key in record.take_finished():
            owner = record.owner(key)
            if key in self.waiting and owner is not None and self.counts(owner):
                del self.waiting[key]
                self.outcomes[key] = _outcome(key, owner)
                tell(len(self.outcomes), len(self.jobs), self.outcomes[key])

    def counts(self, trial: FrozenTrial) -> bool:
        """Whether a trial is finished, and not to be repeated by this call."""
        return trial.state.is_finished() and not self.to_repeat(trial)

    def to_repeat(self, trial: FrozenTrial) -> bool:
        finished_before = trial.state.is_finished() and trial.number < self.before
        return finished_before and self.again is not None and self.again(_outcome(str(job_of(trial)), trial))

    def next_free(self, contested: bool) -> Job | None:
        """The next job that no worker is processing; a random one of them if workers compete for the same job."""
        free = (job for key, job in self.waiting.items() if self.is_free(key))
        if not contested:
            return next(free, None)
        jobs = list(free)
        return _random.choice(jobs) if jobs else None

    def is_free(self, key: str) -> bool:
        record, most = self.claims.record, math.inf if self.deaths is None else self.deaths
        owner = record.owner(key)
        return (
            (owner is None or self.to_repeat(owner))
            and record.failures(key, "error", self.before) <= self.retries
            and record.failures(key, "worker died", 0 if self.again is None else self.before) < most
        )

    def raise_failed(self) -> None:
        for trial in reversed(self.claims.record.trials):
            key = job_of(trial)
            if key in self.waiting and trial.user_attrs.get("failure") == "error":
                raise JobError(
                    f"job {key!r} failed in other workers, most recently with {trial.user_attrs['message']!r}. Fix the "
                    "cause and start again: finished trials are kept."
                )

    def work(self, job: Job) -> bool:
        """Claim a job and evaluate it; return False if another worker owns it."""
        import optuna

        owner = self.claims.record.owner(job.key)
        trial_id = self.claims.claim(job.key, job.params, None if owner is None else owner.number)
        if trial_id is None:
            return False
        began = time.perf_counter()
        with self.claims.beating(trial_id):
            try:
                state, value, info = self.perform(job, trial_id)
                seconds = round(time.perf_counter() - began, 3)
                self.claims.finish(trial_id, state, value, seconds=seconds, info=info)
            except (
                UnavailableError
            ):  # nor can the failure be stored; the mark shows others that nobody works on the job
                raise
            except BaseException as error:
                failure = "error" if isinstance(error, Exception) else "interrupted"
                message = f"{type(error).__name__}: {error}"
                failed = self.claims.finish(trial_id, "FAIL", failure=failure, message=message)
                # This worker was presumed dead and a report was rejected: continue with another job.
                if failed or not isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                    raise
        return True

    def perform(self, job: Job, trial_id: int) -> tuple[str, float | None, dict[str, Any]]:
        import optuna

        trial: optuna.trial.Trial | None = None
        last: float | None = None

        def report(step: int, value: float) -> None:
            nonlocal last, trial
            trial = trial or optuna.trial.Trial(self.claims.study, trial_id)  # reads it again
            trial.report(float(value), int(step))
            last = None if math.isnan(value) else float(value)
            if trial.should_prune():
                raise optuna.TrialPruned(f"{job.key} after step {step}")

        try:
            result = self.evaluate(job, report)
        except optuna.TrialPruned:
            return "PRUNED", last, {}
        value, info = result if isinstance(result, tuple) else (result, {})
        if math.isnan(float(value)):
            raise ValueError(f"evaluate returned nan for job {job.key!r}: return -inf for a job that diverged.")
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
        raise OptionError(f"jobs: the keys {twice} occur twice. Give each job a unique key.")
    if not (math.isfinite(heartbeat) and heartbeat > 0):
        raise OptionError(f"heartbeat={heartbeat!r} lies outside (0, inf). Default: 10.0.")
    if retries < 0:
        raise OptionError(f"retries={retries!r} lies outside [0, inf). Default: 2.")
    if pruner and (pruner.min_steps < 1 or pruner.factor < 2):
        raise OptionError(f"{pruner}: min_steps must be at least 1, and factor at least 2.")
