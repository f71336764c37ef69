"""Choose a strategy: train the most promising ones briefly, and compare them on held-out training samples.

The folds of the training samples take turns being held out. As many recipes as the budget allows are trained for the
first two, since one fold alone often decides by chance; for each further fold, the better half, but at least two, and
whichever would win now, while the budget lasts (successive halving). The lowest mean log loss wins, each taken at its
best temperature, since brief training runs differ in confidence; the most promising strategy is only overruled by more
than a standard error.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_ft.core import UNSET_RATE, Context, OptionError, State
from hf_ft.core.config import BASELINE
from hf_ft.core.plan import stage_borders
from hf_ft.core.recommended import ADAM, SGD
from hf_ft.engine.run import Run
from hf_ft.engine.set_up import set_up
from hf_ft.engine.short_training import fit, predict
from hf_ft.models.preserve import random_states_kept
from hf_ft.search.evaluate import Bar, ShortTrainings
from hf_ft.search.folds import context_on, folds_of
from hf_ft.search.trials import Job, Report, run_trials
from hf_ft.strategies.auto.budget import Budget, Costs
from hf_ft.strategies.auto.candidate import LEAST, Candidate, better_half, compared, held_out
from hf_ft.strategies.auto.findings import reasons
from hf_ft.strategies.auto.recipes import REFUSED, Recipe, measured_advice, recipes
from hf_ft.strategies.auto.result import Choice, winner

logger = logging.get_logger(__name__)
STORAGE = "auto.db"
AVERAGES = 2  # with the initial weights, tried after training
FIRST = 2  # folds for which all recipes are trained, unless there are only two
LOOKING = 0.05  # share of the budget for what `hf-ft advise` measures
NO_ROOM = "the budget has no room for it"


class Chooser:
    """The choice of a strategy for a model and its training data.

    Brief training runs form an Optuna study: an interrupted choice resumes where it stopped, and the processes of a run
    share them. All processes measure in step and arrive at the same choice.

    Args:
        model: the pretrained model with a new head; left unchanged.
        config: the strategy that chooses.
        budget: for the whole run, in full fine-tunings.
        context: samples and recipe.

    Raises:
        OptionError: if there are too few samples, or the storage cannot be opened.
        ImportError: if Optuna is not installed.
    """

    def __init__(self, model: nn.Module, config: Any, budget: float, context: Context) -> None:
        self.model, self.config, self.context = model, config, context
        samples, recipe = context.samples, context.recipe
        if not samples.count:
            samples.read([])  # explains why samples cannot be read by index
        self.explicit = recipe.learning_rate != UNSET_RATE
        self.epochs = max(1, round(config.share * recipe.epochs))
        self.folds = folds_of(samples.count, context.labels, config.folds, context.groups)
        self.trainings = ShortTrainings(model, context, "loss", 1 / config.folds, self.epochs)
        self.costs = Costs(self.trainings.recipe, self.trainings.batches)
        self.whole = samples.count * recipe.epochs  # passes of a full fine-tuning
        self.budget = Budget(budget * self.whole)
        self.declined: dict[str, str] = {}

    def run(self) -> tuple[Recipe, State, Choice]:
        """The chosen recipe, what it measured on all samples, and how it was chosen."""
        looking = self.costs.advising(self.context.samples.count)
        looks = looking <= LOOKING * self.budget.allowed
        expected, signals = measured_advice(self.model, self.context if looks else None)
        optimizer = self.context.recipe.optimizer([{"params": [torch.zeros(1, requires_grad=True)]}])
        optim = SGD if isinstance(optimizer, torch.optim.SGD) else ADAM
        found, declined = recipes(self.config, self.model, optim, not self.explicit, expected, self.config.choose_from)
        self.declined |= declined
        if signals:
            self.budget.spent += looking
        self._count_full(found)
        candidates = self._admitted(found)
        if len(candidates) >= LEAST:
            self._compare(candidates)
        best, state = self._best(found, candidates)
        finishing = self._finishing(best, next((c.ratio for c in candidates if c.recipe is best), None))
        choice = Choice(
            chosen=best.name,
            rate=best.rate,
            tried=compared(candidates),
            declined=self.declined,
            epochs=self.epochs,
            budget=self.budget.allowed / self.whole,
            searching=self.budget.spent / self.whole,
            finishing=finishing / self.whole,
            signals=signals,
        )
        logger.info(f"{self.config.ft_type}: {reasons(choice)}")
        return best, state, choice

    # --- who takes part ------------------------------------------------------------------------------------

    def _count_full(self, found: Sequence[Recipe]) -> None:
        """Count the work of full fine-tuning, in which the budget is given."""
        for recipe in found:
            if recipe.name == BASELINE:
                self.costs.set_full(self.model, self._start(recipe, State()))
                self.budget.spent += len(self.costs.rows) * (1 + self.costs.forward)

    def _admitted(self, found: Sequence[Recipe]) -> list[Candidate]:
        """The recipes that the budget has room for, in the order to try them, measured on the first fold."""
        admitted: list[Candidate] = []
        for recipe in found:
            if len(admitted) == self.config.most:
                self.declined[recipe.name] = f"{self.config.most} others are more promising, or cheaper to try"
                continue
            folds = FIRST if len(admitted) >= LEAST else 1
            planned = sum(self._judging(candidate.recipe, candidate.ratio, folds) for candidate in admitted)
            try:
                candidate = self._candidate(recipe, planned, folds)
            except REFUSED as error:
                self.declined[recipe.name] = str(error)
                continue
            self.budget.finishing = max(self.budget.finishing, self._finishing(recipe, candidate.ratio))
            admitted.append(candidate)
        return admitted

    def _candidate(self, recipe: Recipe, planned: float, folds: int) -> Candidate:
        """Count the cost of training and measure on the first fold, if there is room besides what is planned.

        Raises:
            OptionError, AnatomyError: if the strategy cannot run on the model, cannot be trained briefly, or does not
                fit into the budget.
        """
        # What others are admitted for must still fit after this one's work was counted and its frozen part recorded.
        if not self.budget.fits(planned + len(self.costs.rows) + self.costs.forward * self.context.samples.count):
            raise OptionError(NO_ROOM)
        state, measuring = State(), self._measuring(recipe, 0)
        if needed := recipe.config.must_measure():  # its run is not known before: its declared cost has to fit
            self._check_room(recipe, self.costs.guessed(recipe.config), planned + measuring, folds)
            state, measuring = self._measured_first(recipe, measuring), 0.0
        ratio = self._counted(recipe, state)
        self._check_room(recipe, ratio, planned + measuring, folds)
        if not needed:
            state = self._measured_first(recipe, measuring)
        return Candidate(recipe, ratio, [state])

    def _measured_first(self, recipe: Recipe, passes: float) -> State:
        self.budget.spent += passes
        return self._measured(recipe, self.folds[0].train)

    def _counted(self, recipe: Recipe, state: State) -> float:
        """The cost of training, in passes per sample and epoch; counting it and recording activations are charged.

        Raises:
            OptionError: if the strategy cannot be trained briefly.
        """
        run = self._start(recipe, state)
        stage_borders(run.plan.stages, self._steps(min(len(part.train) for part in self.folds), self.epochs))
        if run.plan.streams:
            raise OptionError("it also trains on other data, which brief training runs do not read")
        passes = self.trainings.recordings.passes
        ratio = self.costs.ratio(run)
        self.budget.spent += len(self.costs.rows) * ratio
        recorded = self.trainings.recordings.passes - passes
        self.budget.spent += recorded * self.costs.forward * self.context.samples.count
        return ratio

    def _steps(self, samples: int, epochs: float) -> int:
        """The least number of optimizer steps in a training run: a last batch of one sample may be dropped."""
        recipe = self.trainings.recipe
        whole, rest = divmod(samples, recipe.batch_size * recipe.accumulation)
        return max(1, int(epochs * (whole + (rest > 1 or not whole))))

    def _check_room(self, recipe: Recipe, ratio: float, planned: float, folds: int) -> None:
        """Reject a recipe whose brief training runs for so many folds do not fit in addition to what is planned.

        Raises:
            OptionError: if they do not.
        """
        if not self.budget.fits(planned + self._judging(recipe, ratio, folds), self._finishing(recipe, ratio)):
            raise OptionError(NO_ROOM)

    def _judging(self, recipe: Recipe, ratio: float, folds: int) -> float:
        """The passes of a recipe's brief training runs for the first folds, once it was measured on the first one."""
        return folds * self._brief(ratio, 0) + (folds - 1) * self._measuring(recipe, 0)

    def _brief(self, ratio: float, fold: int) -> float:
        """The passes of a brief training run, including its evaluation."""
        part = self.folds[fold]
        return ratio * self.epochs * len(part.train) + self.costs.forward * len(part.held_out)

    def _measuring(self, recipe: Recipe, fold: int) -> float:
        return self.costs.measuring(recipe.config, len(self.folds[fold].train))

    def _finishing(self, recipe: Recipe, ratio: float | None) -> float:
        """The passes of the final training with this recipe, including its measurement."""
        # If samples are augmented, recorded activations are of no use there.
        ratio = max(self.costs.guessed(recipe.config), ratio or 0.0)
        count = self.context.samples.count
        # Normalisation layers are re-measured for each average; evaluations do not count, here as during training.
        averaging = AVERAGES * self.costs.forward * count if self.config.average else 0.0
        return ratio * self.whole + self.costs.measuring(recipe.config, count) + averaging

    # --- brief training runs -------------------------------------------------------------------------------

    def _compare(self, candidates: Sequence[Candidate]) -> None:
        """Train all for the first folds, and the better half for each further one, while the budget lasts."""
        running = list(candidates)
        with Bar(len(running), "Choosing a strategy", "log loss", not self.context.progress) as bar:
            for fold in range(len(self.folds)):
                if fold >= FIRST:
                    running = better_half(running)
                    self.budget.finishing = max(self._finishing(c.recipe, c.ratio) for c in running)
                if fold:
                    cost = sum(self._brief(c.ratio, fold) + self._measuring(c.recipe, fold) for c in running)
                    if not self.budget.fits(cost):
                        return
                    self.budget.spent += sum(self._measuring(c.recipe, fold) for c in running)
                self.budget.spent += sum(self._brief(c.ratio, fold) for c in running)
                self._train(running, fold, bar)

    def _train(self, running: Sequence[Candidate], fold: int, bar: Bar) -> None:
        jobs = [self._job(candidate.recipe, fold) for candidate in running]
        by_key = dict(zip([job.key for job in jobs], running, strict=True))
        signature = self._signature
        digest = hashlib.sha256(json.dumps(signature, sort_keys=True, default=str).encode()).hexdigest()
        storage = self.trainings.storage(self.config.storage, STORAGE)
        for candidate in running:  # all processes in step: what is measured may need all of them
            if len(candidate.states) <= fold:
                candidate.states.append(self._measured(candidate.recipe, self.folds[fold].train))

        def evaluate(job: Job, report: Report) -> tuple[float, dict[str, Any]]:
            return self._score(by_key[job.key], fold)

        bar.bar.total = bar.before + len(jobs)
        outcomes = run_trials(
            jobs,
            evaluate,
            storage=storage,
            name=f"auto-{digest[:12]}",
            signature=signature,
            progress=bar,
        )
        bar.move_to(bar.before + len(jobs))
        for key, candidate in by_key.items():
            candidate.outcomes.append(outcomes[key])

    @cached_property
    def _signature(self) -> dict[str, Any]:
        """Everything that the score of a recipe on a fold depends on."""
        return self.trainings.describe({"folds": len(self.folds), "epochs": self.epochs})

    def _job(self, recipe: Recipe, fold: int) -> Job:
        content = [recipe.config.identity(), recipe.rate]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        return Job(f"{recipe.name}-{digest}/fold{fold}", {"strategy": recipe.name, "fold": fold})

    def _score(self, candidate: Candidate, fold: int) -> tuple[float, dict[str, Any]]:
        """Train briefly, and return the negative log loss on the held-out samples and the accuracy on them."""
        part, found = self.folds[fold], dict[str, Any]()
        recipe = self._at(candidate.recipe, self.trainings.recipe)
        run = self._start(candidate.recipe, candidate.states[fold])

        def after_epoch(epoch: int, objective: Any) -> None:
            if epoch == self.epochs:
                found["held out"] = predict(objective, recipe, self.trainings.batches, part.held_out)

        fit(run, recipe, self.trainings.batches, part.train, self.epochs, fold, after_epoch)
        logits, labels, task = found["held out"]
        judged = held_out(logits, labels, task, recipe.task_loss)
        value = -judged.loss if math.isfinite(judged.loss) else -math.inf
        return value, {"accuracy": judged.accuracy, "losses": list(judged.losses)}

    def _start(self, recipe: Recipe, state: State) -> Run:
        """A copy of the model, prepared for training a recipe."""
        with random_states_kept(0):
            return set_up(copy.deepcopy(self.model), recipe.config, self.context, {recipe.name: state})

    def _measured(self, recipe: Recipe, rows: Sequence[int] | None) -> State:
        """What a recipe measures on these training samples; None for all."""
        if not recipe.config.measures():
            return State()
        context = context_on(self.context, rows)
        with random_states_kept(0):
            found = recipe.config.measure(
                self.model, dataclasses.replace(context, recipe=self._at(recipe, context.recipe), progress=False)
            )
        return found

    def _at(self, recipe: Recipe, training: Any) -> Any:
        """The training recipe with the learning rate of a recipe."""
        return training if recipe.rate is None else dataclasses.replace(training, learning_rate=recipe.rate)

    # --- the choice ----------------------------------------------------------------------------------------

    def _best(self, found: Sequence[Recipe], candidates: Sequence[Candidate]) -> tuple[Recipe, State]:
        """The recipe that wins, and what it measures on all samples.

        If nothing was compared, it is the one with the highest expected gain among those that can run.
        """
        if tried := compared(candidates):
            first = winner(tried).strategy
            order = [candidate.recipe for candidate in candidates if candidate.recipe.name == first]
        else:
            order = sorted(found, key=lambda one: -one.expected)
        problem: Exception | None = None
        for recipe in order:
            try:
                state = self._measured(recipe, None)
                stages = self._start(recipe, state).plan.stages
                stage_borders(stages, self._steps(self.context.samples.count, self.context.recipe.epochs))
                return recipe, state
            except REFUSED as error:
                problem = error
        raise OptionError(f"{self.config.ft_type}: no strategy can train this model; the last one failed: {problem}")
