"""Claims: each job is evaluated by exactly one of the processes that share a study.

Mutual exclusion: a worker claims a job by adding a RUNNING trial. Storages number a study's trials in the order in
which others can see them, so all workers agree on the owner: the first of the job's trials that has not failed. Only
the owner evaluates the job; a worker that comes second fails its own trial. FAIL is final, so a job never has two
owners. That order is guaranteed

- in SQLite, which has one writer at a time,
- in PostgreSQL and MySQL, since Optuna locks the study's row before it inserts a trial and counts the earlier ones,
  until everything is committed; sequences alone would not guarantee it, nor sessions that read a snapshot of their
beginning,
- in a journal, where the number is the position among the lines of a file to which one worker at a time appends,
- behind a gRPC server, if it is in the storage to which the server passes everything on.

Crash recovery: a thread renews a mark on the trial. A worker that sees the mark unchanged for six intervals by its own
clock (clocks of machines differ), or sees that the process on its own machine is gone, fails the trial, and the job is
free again. If the trial's worker was only paused, the storage rejects its late result.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_ft.processes import is_gone, process_name
from hf_ft.search.record import INSTEAD, Record, job_of
from hf_ft.search.storage import GoneError, is_refused, one_transaction, reachable
from hf_ft.search.study import check_signature, readable_study

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

PATIENCE = 6  # heartbeats that a worker may miss: the interpreter or the disk may be busy for a while
# System attributes of trials.
BEAT, INTERVAL, SIGNATURE = "hf_ft:heartbeat", "hf_ft:heartbeat_interval", "hf_ft:signature"
PROCESS = "hf_ft:process"


@dataclass
class Claims:
    """The claims of one worker on a study.

    Attributes:
        storage: storage that holds the study.
        study: the study.
        signature: everything the scores depend on.
        heartbeat: seconds between renewals of a trial's mark.
        all_params: parameters of all jobs, which determine the ranges in Optuna's plots.
        marks: by trial, the last mark of its worker and the time since when it has been seen.
        record: the trials as last read.
        read_at: when that was.
    """

    storage: BaseStorage
    study: Study
    signature: Mapping[str, Any]
    heartbeat: float
    all_params: Sequence[Mapping[str, Any]]
    marks: dict[int, tuple[Any, float]] = field(default_factory=dict)
    record: Record = field(default_factory=Record)
    read_at: float = -math.inf

    def read(self) -> Record:
        """Read the trials into ``record``, and fail those of dead workers.

        Raises:
            OptionError: if the study has another signature, or is damaged.
        """
        with readable_study(self.study.study_name):
            trials = self.study.get_trials(deepcopy=False)
            if trials and trials[-1].number + 1 != len(trials):
                raise ValueError("a trial is missing")
            for trial in self.record.news(trials):
                _check(trial)
        if trials:  # The signature is on the first trial, so it can be neither missing nor set twice.
            check_signature(trials[0].system_attrs.get(SIGNATURE), self.signature, self.study.study_name)
        self.record.update(trials)
        self.read_at = time.monotonic()
        for trial in reversed(self.record.running()):  # owners last, so that no other seems to be the owner in between
            if self._dead(trial):
                owner = self.record.owner(str(job_of(trial)))
                worked = owner is not None and owner.number == trial.number
                self.finish(trial._trial_id, "FAIL", failure="worker died" if worked else "withdrawn")
        return self.record

    def _dead(self, trial: FrozenTrial) -> bool:
        return is_gone(trial.system_attrs.get(PROCESS) or "") or self._silent(trial)

    def _silent(self, trial: FrozenTrial) -> bool:
        mark, now = trial.system_attrs.get(BEAT), time.monotonic()
        if trial._trial_id not in self.marks or self.marks[trial._trial_id][0] != mark:
            self.marks[trial._trial_id] = (mark, now)
        return now - self.marks[trial._trial_id][1] > PATIENCE * trial.system_attrs[INTERVAL]

    def claim(self, job: str, params: Mapping[str, Any], instead: int | None = None) -> int | None:
        """Claim a job that had no owner when the trials were last read, or whose owner is to be repeated.

        Args:
            instead: number of the trial that this one repeats.

        Returns:
            The trial to evaluate, or None if another worker was faster.
        """
        with readable_study(self.study.study_name):
            trial_id, is_owner = self._add_trial(job, params, instead), False
        try:
            record = self.read()
            owner = record.owner(job)
            if owner is not None and owner._trial_id == trial_id:
                if record.trials[0]._trial_id == trial_id:
                    self.study.set_user_attr("signature", self.signature)  # for people to read
                is_owner = True
        finally:
            if not is_owner:
                self.finish(trial_id, "FAIL", failure="withdrawn")
        return trial_id if is_owner else None

    def _add_trial(self, job: str, params: Mapping[str, Any], instead: int | None = None) -> int:
        """Add a RUNNING trial with everything that other workers need to know, in a single step."""
        from optuna.trial import TrialState, create_trial

        system = {BEAT: _now(), INTERVAL: self.heartbeat, PROCESS: process_name()}
        system |= {} if self.record.trials else {SIGNATURE: self.signature}
        distributions = self._distributions(params)
        user = {name: value for name, value in params.items() if name not in distributions}
        user |= {} if instead is None else {INSTEAD: instead}
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: params[name] for name in distributions},
            distributions=distributions,
            user_attrs={**user, "job": job, "worker": f"{socket.gethostname()}:{os.getpid()}"},
            system_attrs=system,
        )
        try:
            return self.storage.create_new_trial(self.study_id, template)
        except Exception as error:  # a concurrent job list has just registered other choices for a parameter
            if not params or not is_refused(error):
                raise
            return self._add_trial(job, {}, instead)

    @cached_property
    def study_id(self) -> int:
        return self.storage.get_study_id_from_name(self.study.study_name)

    def _distributions(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """The range of each parameter, for Optuna's plots.

        Optuna requires the kind and choices of a parameter to stay the same throughout a study. A value that does not
        fit (a new block in a later job list) is omitted.
        """
        from optuna.distributions import CategoricalDistribution

        distributions: dict[str, BaseDistribution] = {}
        for name, value in params.items():
            own = self._ranges[name]
            previous = self.record.distributions.get(name, own)
            if isinstance(previous, CategoricalDistribution):
                if value in previous.choices:
                    distributions[name] = previous
            elif type(previous) is type(own):
                distributions[name] = own
        return distributions

    @cached_property
    def _ranges(self) -> dict[str, BaseDistribution]:
        """The range of each parameter over all jobs."""
        values = defaultdict(list)
        for params in self.all_params:
            for name, value in params.items():
                values[name].append(value)
        return {name: _distribution(of_one) for name, of_one in values.items()}

    def finish(self, trial_id: int, state: str, value: float | None = None, **attributes: Any) -> bool:
        """Set the final state of a trial; return False if another worker has already done so.

        Raises:
            GoneError: if the server cannot be reached for as long as this worker would not be presumed dead.
        """
        began = time.monotonic()
        while True:
            try:
                with reachable(self.storage):
                    return self._finish(trial_id, state, value, attributes)
            except GoneError:  # from a server that restarts: the result of a long training run is worth the wait
                if time.monotonic() - began > PATIENCE * self.heartbeat:
                    raise
                time.sleep(min(1.0, self.heartbeat))

    def _finish(self, trial_id: int, state: str, value: float | None, attributes: Mapping[str, Any]) -> bool:
        import optuna

        values = None if value is None else [value]
        try:
            with one_transaction(self.storage, trial_id):
                for key, attribute in attributes.items():
                    self.storage.set_trial_user_attr(trial_id, key, attribute)
                return self.storage.set_trial_state_values(trial_id, optuna.trial.TrialState[state], values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    @contextmanager
    def beating(self, trial_id: int) -> Iterator[None]:
        """Renew the trial's mark from a background thread."""
        import optuna

        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.heartbeat):
                try:
                    self.storage.set_trial_system_attr(trial_id, BEAT, _now())
                except optuna.exceptions.UpdateFinishedTrialError:
                    return
                except Exception as error:  # the next one may succeed
                    logging.getLogger(__name__).warning("could not write a heartbeat: %s", error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _check(trial: FrozenTrial) -> None:
    """Check that a trial holds what workers write into it.

    Raises:
        ValueError: if it does not.
    """
    if job_of(trial) is None:
        return
    finished = trial.state.name in ("COMPLETE", "PRUNED")
    kinds: list[tuple[Mapping[str, Any], str, Any]] = [
        (trial.user_attrs, "job", str),
        (trial.system_attrs, INTERVAL, int | float),
    ]
    kinds += [(trial.user_attrs, "seconds", int | float), (trial.user_attrs, "info", dict)] if finished else []
    if not trial.number:
        kinds.append((trial.system_attrs, SIGNATURE, dict | None))
    wrong = [key for attributes, key, kind in kinds if not isinstance(attributes.get(key), kind)]
    if wrong or (trial.state.name == "COMPLETE" and not trial.values):
        raise ValueError(f"trial {trial.number} lacks {wrong[0] if wrong else 'its value'}")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kinds = {type(value) for value in values}
    if kinds == {int}:
        return IntDistribution(min(values), max(values))
    if kinds <= {int, float}:
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(tuple(dict.fromkeys(values)))
