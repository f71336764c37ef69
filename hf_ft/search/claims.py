"""Claims: of all processes that work on one study, one evaluates each job.

How a job is done once: a worker claims it by adding a RUNNING trial. Storages number a study's trials in the order in
which they add them, so all workers agree on the owner: of the job's trials that have not failed, the first. Only the
owner evaluates; who comes second fails its own trial. FAIL is final, so no two trials of a job ever own it both.

How a job outlives its worker: a thread renews a mark on the trial. Who sees the mark unchanged for six intervals by its
own clock (clocks of machines differ) fails the trial, and the job is free again. If its worker was only paused, the
storage refuses the late result.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hf_ft.search.storage import check_signature

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

PATIENCE = 6  # heartbeats a worker may miss: the interpreter or the disk may be busy for a while
BEAT, INTERVAL, SIGNATURE = "hf_ft:heartbeat", "hf_ft:heartbeat_interval", "hf_ft:signature"  # system attributes


def owners(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """The owner of each job: of its trials that have not failed, the one with the lowest number."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials:
        job = job_of(trial)
        if job is not None and trial.state.name != "FAIL":
            found.setdefault(job, trial)
    return found


def job_of(trial: FrozenTrial) -> str | None:
    """The key of a trial's job."""
    return trial.user_attrs.get("job")


@dataclass
class Claims:
    """One worker's hold on a study.

    Attributes:
        storage: where the study is kept.
        study: the study.
        signature: what its scores depend on.
        heartbeat: seconds between signs of life.
        all_params: the parameters of all jobs, which give the ranges in Optuna's plots.
        marks: by trial, the last mark of its worker, and since when we see it.
    """

    storage: BaseStorage
    study: Study
    signature: Mapping[str, Any]
    heartbeat: float
    all_params: Sequence[Mapping[str, Any]]
    marks: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def read(self) -> list[FrozenTrial]:
        """All trials, lowest number first; those of silent workers fail.

        Raises:
            OptionError: the study has another signature.
        """
        trials = self.study.get_trials(deepcopy=False)
        if trials:  # The signature is on the first trial: so it cannot be missing, nor set twice.
            check_signature(trials[0].system_attrs.get(SIGNATURE), self.signature, self.study.study_name)
        for trial in trials:
            if trial.state.name == "RUNNING" and job_of(trial) is not None and self._silent(trial):
                self.finish(trial._trial_id, "FAIL", failure="worker died")
        return trials

    def _silent(self, trial: FrozenTrial) -> bool:
        mark, now = trial.system_attrs.get(BEAT), time.monotonic()
        if trial._trial_id not in self.marks or self.marks[trial._trial_id][0] != mark:
            self.marks[trial._trial_id] = (mark, now)
        return now - self.marks[trial._trial_id][1] > PATIENCE * trial.system_attrs[INTERVAL]

    def claim(self, job: str, params: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> int | None:
        """Claim a job that nobody owned when ``trials`` were read.

        Returns:
            The trial to evaluate, or None if another worker was first.
        """
        trial_id, owned = self._add_trial(job, params, trials), False
        try:
            trials = self.read()
            owner = owners(trials).get(job)
            if owner is not None and owner._trial_id == trial_id:
                if trials[0]._trial_id == trial_id:
                    self.study.set_user_attr("signature", self.signature)  # for people to read
                owned = True
        finally:
            if not owned:
                self.finish(trial_id, "FAIL", failure="withdrawn")
        return trial_id if owned else None

    def _add_trial(self, job: str, params: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> int:
        """A RUNNING trial with all that other workers have to know of it, in one step."""
        from optuna.trial import TrialState, create_trial

        system = {BEAT: _now(), INTERVAL: self.heartbeat, **({} if trials else {SIGNATURE: self.signature})}
        plotted = _distributions(params, self.all_params, trials)
        user = {name: value for name, value in params.items() if name not in plotted}
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: params[name] for name in plotted},
            distributions=plotted,
            user_attrs={**user, "job": job, "worker": f"{socket.gethostname()}:{os.getpid()}"},
            system_attrs=system,
        )
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        try:
            return self.storage.create_new_trial(study_id, template)
        except ValueError:  # another list of jobs, in this moment, gave a parameter other choices
            if not params:
                raise
            return self._add_trial(job, {}, trials)

    def finish(self, trial_id: int, state: str, value: float | None = None, **attributes: Any) -> bool:
        """Set a trial's last state; False if another worker did before."""
        import optuna

        try:
            for key, attribute in attributes.items():
                self.storage.set_trial_user_attr(trial_id, key, attribute)
            values = None if value is None else [value]
            return self.storage.set_trial_state_values(trial_id, optuna.trial.TrialState[state], values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    @contextmanager
    def beating(self, trial_id: int) -> Iterator[None]:
        """Renew the trial's mark from a thread."""
        import optuna

        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.heartbeat):
                try:
                    self.storage.set_trial_system_attr(trial_id, BEAT, _now())
                except optuna.exceptions.UpdateFinishedTrialError:
                    return
                except Exception as error:  # the next one may get through
                    logging.getLogger(__name__).warning("no heartbeat written: %s", error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _distributions(
    params: Mapping[str, Any], all_params: Sequence[Mapping[str, Any]], trials: Sequence[FrozenTrial]
) -> dict[str, BaseDistribution]:
    """The range of each parameter, for Optuna's plots.

    Optuna wants each parameter to keep its kind, and its choices, all over a study. A value that does not fit (a new
    block in a later list of jobs) is left out.
    """
    from optuna.distributions import CategoricalDistribution

    first = {name: known for trial in reversed(trials) for name, known in trial.distributions.items()}
    found: dict[str, BaseDistribution] = {}
    for name, value in params.items():
        own = _distribution([others[name] for others in all_params if name in others])
        known = first.get(name, own)
        if isinstance(known, CategoricalDistribution):
            if value in known.choices:
                found[name] = known
        elif type(known) is type(own):
            found[name] = own
    return found


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kinds = {type(value) for value in values}
    if kinds == {int}:
        return IntDistribution(min(values), max(values))
    if kinds <= {int, float}:
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(tuple(dict.fromkeys(values)))
