"""Runs a comparison: equal tuning budgets, then final runs, as jobs that workers share.

Each strategy is first trained once with its defaults, which also counts its work. The budget is the work of ``trials``
such runs of full fine-tuning; every strategy gets as many trials as fit into it, after deducting the work of its
measurement. The settings of all trials are determined in advance, so the training runs do not depend on
the number of workers or on interruptions. The best trial by validation and the defaults are trained again with two
seeds; the better of the two is trained with the other seeds as well. Only these final runs are evaluated on the test
sets, which decide nothing.

If parts of a few labelled samples take turns as validation (:mod:`hf_ft.comparison.folds`), a trial is trained once
for each of them, and the final runs use them in turn.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_ft.comparison.contenders import OPTIM, Entrant
from hf_ft.comparison.folder import STORAGE, Kept
from hf_ft.comparison.ledger import TUNING_SEED, Done, Ledger, Planned, done_from
from hf_ft.comparison.results import Training
from hf_ft.comparison.settings import Settings
from hf_ft.comparison.tracking import run_name
from hf_ft.comparison.training import CommonSettings, Measured, averaged, train, versions
from hf_ft.core.search_space import RATE
from hf_ft.engine.work import Work
from hf_ft.errors import AnatomyError, MachineError, OptionError
from hf_ft.search.environment import environment_error
from hf_ft.search.storage import open_storage
from hf_ft.search.trials import Job, Outcome, Report, run_trials

REFUSED = (OptionError, AnatomyError)
DEATHS = 2  # process deaths within one training run before it counts as failed
DIED = f"its process died {DEATHS} times: out of memory?"
logger = logging.get_logger(__name__)
Tell = Callable[[str], None]


class Runner:
    """Runs the unfinished training runs of a comparison.

    Args:
        entrants: the contenders, full fine-tuning first.
        settings: budget and shared settings.
        common: training settings of all contenders.
        folder: folder for results, models and states, shared by all workers.
        signature: what the scores depend on, in addition to the contenders.
        tell: called with each line of progress.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        settings: Settings,
        common: CommonSettings,
        folder: Path,
        signature: Mapping[str, Any],
        tell: Tell = lambda line: None,
    ) -> None:
        self.ledger = Ledger(entrants, settings, common.greater_is_better)
        self.settings, self.common, self.folder = settings, common, folder
        self.signature, self.tell, self.kept = signature, tell, Kept(folder, settings.soup != "none")
        self._storage = open_storage(settings.storage or str(folder / STORAGE))
        self._warm = False
        self._deadline = math.inf if settings.hours is None else time.monotonic() + 3600 * settings.hours

    def run(self, only: Collection[str] | None = None) -> None:
        """Run all unfinished training runs, or as many as the time limit allows.

        Args:
            only: names of the contenders to run; of full fine-tuning, only the trial on which the budget depends.
        """
        # Otherwise garbage collection during each run would traverse the objects of all imported modules.
        ours = not gc.get_freeze_count()  # unfreezing would also thaw what the caller froze
        if ours:
            gc.collect()
            gc.freeze()
        try:
            self._run(only)
        finally:
            if ours:
                gc.unfreeze()

    def _run(self, only: Collection[str] | None) -> None:
        ledger = self.ledger
        entrants = [entrant for entrant in ledger.entrants if only is None or entrant.name in only]
        if only is not None and self.settings.trials:
            self._perform([Planned(ledger.entrants[0], "trial", 0, 0)])
        waves = [entrants]
        if self.settings.hours is not None:
            # One contender after the other, so that finished contenders can be compared when time runs out. The loop
            # then continues, but only reads finished results.
            waves = [[entrant] for entrant in entrants]
        for wave in waves:
            if self.settings.trials:
                self._tune(wave)
            self._perform([run for entrant in wave for run in ledger.confirming(entrant)])
            chosen = [(entrant, found) for entrant in wave if (found := ledger.chosen(entrant)) is not None]
            seeds = range(1, self.settings.seeds + 1)
            self._perform([Planned(entrant, "run", seed, setting) for entrant, setting in chosen for seed in seeds])

    def _tune(self, wave: Sequence[Entrant]) -> None:
        ledger = self.ledger
        self._perform([Planned(entrant, "trial", 0, 0) for entrant in wave])
        while wanted := [
            Planned(e, "trial", i, i) for e in wave for i in range(1, ledger.trials_of(e)) if ledger.trial(e, i) is None
        ]:
            self._perform(wanted)
            if time.monotonic() >= self._deadline:
                break

    def _warm_up(self) -> None:
        """Run a few uncounted steps: the first run in a process is slower, which would distort its seconds."""
        short = dataclasses.replace(self.common, arguments={**self.common.arguments, "max_steps": 3})
        first = self.ledger.entrants[0]
        with suppress(Exception):  # errors are reported by the runs themselves
            train(first, self.ledger.settings_of(first)[0], TUNING_SEED, short, self.kept.work("warm-up"))

    # --- jobs ----------------------------------------------------------------------------------------------

    def _perform(self, wanted: Sequence[Planned]) -> None:
        jobs, what = [], {}
        for planned in wanted:
            key = self.ledger.key(planned)
            what[key] = planned
            shown = {k: v for k, v in self.ledger.values(planned).items() if v is not None}
            jobs.append(Job(key, {"strategy": planned.entrant.name, "kind": planned.kind, **shown}))

        def evaluate(job: Job, report: Report) -> tuple[float, dict[str, Any]]:
            if not self._warm:  # not before it is known that there is something to train
                self._warm_up()
                self._warm = True
            return self._evaluate(what[job.key])

        def progress(finished: int, all_jobs: int, outcome: Outcome | None) -> None:
            if outcome is not None:
                self._told(finished, all_jobs, what[outcome.key], done_from(outcome))

        outcomes = run_trials(
            jobs,
            evaluate,
            deaths=DEATHS,
            storage=self._storage,
            name=self.settings.study_name,
            signature=self.signature,
            progress=progress,
            stop=lambda: time.monotonic() >= self._deadline,
            again=(lambda outcome: bool(outcome.info["training"]["error"])) if self.settings.retry_failed else None,
        )
        self.ledger.done |= {key: done_from(outcome) for key, outcome in outcomes.items()}
        if time.monotonic() < self._deadline:
            for key in what.keys() - outcomes.keys():
                self.ledger.done[key] = Done(self._failed(what[key], DIED), 0.0)

    def _evaluate(self, planned: Planned) -> tuple[float, dict[str, Any]]:
        entrant, kind, number = planned.entrant, planned.kind, planned.number
        name = entrant.file_name(self.ledger.values(planned))
        info: dict[str, Any] = {"refused": False, "measured_compute": 0.0, "found": {}, "learned": ""}
        # Compiled code is not counted: there, the budget is one of seconds.
        counts = kind == "trial" and number == 0 and not self.common.arguments.get("torch_compile")
        counted = Work() if counts else None
        try:
            if entrant.refusal:
                raise OptionError(entrant.refusal)
            if kind == "trial":
                training = self._trial(planned, info, counted)
            else:
                training = self._train(planned, number - 1, info)
            if kind == "run" and not training.error:
                training = dataclasses.replace(training, logits=self.kept.keep_logits(name, number))
            if (kind == "run" or self.settings.keeps_trials) and not training.error:
                self.kept.keep_best(name, training.seed, self.ledger.score(training))
        except Exception as error:  # a failed run must not stop the comparison
            cause = environment_error(error)
            if cause is not None:
                what = f"{entrant.name}, {kind} {number + (kind == 'trial')}"
                raise MachineError(
                    f"{what}: {type(cause).__name__}: {cause}. Free some space and run it again: what is finished is "
                    "kept."
                ) from error
            logger.info(f"{entrant.name}: {error}", exc_info=True)
            refused = isinstance(error, REFUSED)
            training = self._failed(planned, str(error) if refused else f"{type(error).__name__}: {error}")
            info["refused"] = refused
        info["measured_work"] = info["measured_compute"] if counted is None else counted.measured
        info["work"] = training.compute if counted is None else counted.trained
        return self.ledger.score(training), {"training": dataclasses.asdict(training), **info}

    def _trial(self, planned: Planned, info: dict[str, Any], counted: Work | None) -> Training:
        """Train once on each fold; the work is counted on the first, and the others take the same."""
        trainings: list[Training] = []
        for fold in range(len(planned.entrant.bench.folds)):
            trainings.append(self._train(planned, fold, info, counted if fold == 0 else None))
            if trainings[-1].error:
                break
        return averaged(trainings)

    def _train(self, planned: Planned, fold: int, info: dict[str, Any], counted: Work | None = None) -> Training:
        """Train on a fold; what the first run measures there is kept for the others."""
        entrant, kind, number = planned.entrant, planned.kind, planned.number
        values = self.ledger.values(planned)
        name = entrant.file_name(values)

        def on_measured(measured: Measured) -> None:
            if entrant.looks:
                self.kept.keep_states(self._name_of_states(entrant, fold), measured.states, measured.compute)
                if not info["measured_compute"]:
                    info.update(measured_compute=measured.compute, **_findings(entrant, measured))

        known = None if kind == "trial" and number == 0 else self._measured(entrant, fold)
        final = kind == "run"
        if known is not None and final and number == 1 and not self.settings.trials:
            # The contender's first run, which was interrupted after it had measured.
            info.update(measured_compute=known.compute, **_findings(entrant, known))
        save_to = self.kept.model(name, planned.seed) if final or self.settings.keeps_trials else None
        work = self.kept.work(f"{name}-{kind}-{number}")
        run = run_name(entrant.name, _shown(kind, number), None if final or not entrant.bench.others else fold)
        on = entrant.on_fold(fold)
        return train(on, values, planned.seed, self.common, work, known, save_to, final, on_measured, counted, run)

    def _failed(self, planned: Planned, error: str) -> Training:
        return Training(planned.seed, self.ledger.values(planned), None, error=error, versions=versions())

    def _measured(self, entrant: Entrant, fold: int) -> Measured | None:
        """The measurement of the contender's first run on a fold, reused by all others; None if there is none."""
        if not entrant.looks:
            return Measured({}, 0.0)
        kept = self.kept.states(self._name_of_states(entrant, fold))
        return None if kept is None else Measured(*kept)

    def _name_of_states(self, entrant: Entrant, fold: int) -> str:
        number = fold % len(entrant.bench.folds)
        return entrant.file_name() + (f"-fold-{number}" if number else "")

    def _told(self, finished: int, all_jobs: int, planned: Planned, done: Done) -> None:
        training = done.training
        names = {RATE: "lr", OPTIM: ""}
        named = ", ".join(
            f"{names.get(key, key.rpartition('.')[2])} {_short(value)}".strip()
            for key, value in training.params.items()
        )
        what = f"{planned.entrant.name} {_shown(planned.kind, planned.number)}"
        score = training.error or f"{self.common.metric} {training.validation:.3f}"
        self.tell(f"[{finished}/{all_jobs}] {what} ({named}): {score}, {done.seconds:.0f} s")

    # --- the winner ----------------------------------------------------------------------------------------

    def model_of(self, entrant: Entrant, run: Training) -> Path:
        """The folder of the model of a final run or a trial; it is trained again if it was not kept."""
        name = entrant.file_name(run.params)
        if not self.kept.has_model(name, run.seed):
            work, fold = self.kept.work("again"), max(0, run.seed - 1)
            known, saved = self._measured(entrant, fold), self.kept.model(name, run.seed)
            final = run.seed != TUNING_SEED
            again = train(entrant.on_fold(fold), run.params, run.seed, self.common, work, known, saved, final)
            if again.validation != run.validation:
                scores = f"{again.validation or math.nan:.3f} instead of {run.validation or math.nan:.3f} on validation"
                logger.warning(
                    f"{entrant.name} was trained again with seed {run.seed} and scores {scores}: training is not "
                    "reproducible here."
                )
            self.kept.keep_logits(name, run.seed)
            self.kept.mark(name, run.seed, self.ledger.score(run))
        found = self.kept.saved(name, run.seed)
        assert found is not None
        return found

    def save_winner(self) -> Path | None:
        """Save the winner's model in ``best``, retraining it if it was not kept; None if there is no winner."""
        found = self.ledger.winner()
        if found is None:
            return None
        entrant, run = found
        name = entrant.file_name(run.params)
        with self.kept.locked():
            self.model_of(entrant, run)
            best = self.kept.crown(name, run.seed)
            if self.ledger.complete:
                self.kept.clear()
        return best


def _findings(entrant: Entrant, measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {}
    learned = []
    for config in entrant.configs:
        state = measured.states.get(config.ft_type)
        if state is not None:
            found |= dict(state.info)
            learned.append(config.findings(state).summary)
    return {"found": found, "learned": " ".join(filter(None, learned))}


def _shown(kind: str, number: int) -> str:
    return f"trial {number + 1}" if kind == "trial" else f"seed {number}"


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
