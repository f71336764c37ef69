"""Search for the number of frozen layers of each source model: a particle swarm whose evaluations are Optuna trials.

Reference: Feng et al., PeerJ Computer Science 2107 (2024). The swarm itself: :mod:`hf_ft.strategies.amcf.swarm`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from hf_ft.core.context import Context
from hf_ft.core.plan import Plan, trained_by
from hf_ft.engine.frozen.freezing import liveness, moving_norms
from hf_ft.engine.run import Run
from hf_ft.search.evaluate import Bar, SearchOptions, ShortTrainings, epochs_of, score_jobs
from hf_ft.search.storage import open_storage
from hf_ft.search.trials import Job, Outcome, Progress
from hf_ft.strategies.amcf.scores import Evaluation, Generation, SwarmScores
from hf_ft.strategies.amcf.swarm import begin, move, remember

STORAGE = "swarm_search.db"
Position = tuple[int, ...]


class SwarmOptions(SearchOptions, Protocol):
    """What the search requires of its strategy; implemented by :class:`~hf_ft.AMCFConfig`."""

    @property
    def particles(self) -> int: ...

    @property
    def iterations(self) -> int: ...

    @property
    def search_schedule(self) -> str: ...

    @property
    def search_budget(self) -> int | None: ...

    @property
    def patience(self) -> int | None: ...

    @property
    def search_seed(self) -> int: ...

    def members(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Members by module name."""

    def layers(self, model: nn.Module) -> tuple[int, ...]:
        """Number of layers of each member."""

    def planner(self, model: nn.Module) -> Callable[[Position], Plan]:
        """The complete plan for training each position."""

    def start(self, model: nn.Module, plan: Plan) -> Run:
        """Prepare a model for training one position."""


@dataclass
class SwarmSearch:
    """Move a swarm over the numbers of frozen layers, scoring each distinct position once.

    Every position starts from the same weights and heads, sees the data in the same order, and has the same budget.
    Its score is the ensemble's score at its best epoch, on a held-out split of the training samples. A generation
    waits for all of its particles. Evaluations are trials of one Optuna study, which any number of processes may
    share; an interrupted search resumes where it stopped.

    Args:
        model: the source models with new heads; left unchanged.
        options: swarm, budget, metric and storage.
        context: samples and recipe, for instance :meth:`hf_ft.FTTrainer.context`.
        progress: whether to show a progress bar; None for the context's setting.

    Raises:
        OptionError: if an option does not fit the model or the data, or the storage cannot be opened.
        ImportError: if Optuna is not installed.
    """

    model: nn.Module
    options: SwarmOptions
    context: Context
    progress: bool | None = None

    def __post_init__(self) -> None:
        options, context = self.options, self.context
        self.layers = options.layers(self.model)
        # The swarm's own options are left out, so that another swarm on the same study reuses its evaluations.
        unused = ["frozen", "storage", "particles", "iterations", "search_budget", "patience", "source_models"]
        if options.search_schedule == "constant":
            context = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, curve=_constant))
        self.trainings = ShortTrainings(self.model, context, options.metric, options.validation, options.search_epochs)
        settings = {key: value for key, value in options.identity().items() if key not in unused}
        self._signature = self.trainings.describe(settings)
        # Shared by all generations: with in-memory storage, each would otherwise start from an empty study.
        self._storage = open_storage(self.trainings.storage(options.storage, STORAGE))
        self._chains = options.anatomy(self.model).chains
        self._plan_for = options.planner(self.model)

    def run(self) -> SwarmScores:
        """Train and score what no earlier or parallel process has done; return all generations."""
        options = self.options
        swarm = begin(self.layers, options.particles, options.search_seed)
        outcomes: dict[Position, Outcome] = {}
        generations: list[Generation] = []
        grew, stopped = 0, ""
        with self._bar() as bar:
            for generation in range(options.iterations + 1):
                new = [position for position in dict.fromkeys(swarm.integers()) if position not in outcomes]
                room = len(new) if options.search_budget is None else options.search_budget - len(outcomes)
                outcomes |= self._evaluate(new[:room], bar)
                if len(new) > room:
                    stopped = f"the budget of {options.search_budget} training runs is used up"
                    break
                scores = [_fitness(outcomes[position]) for position in swarm.integers()]
                generations.append(Generation.of(swarm, scores))
                bar.move_to(options.particles * (generation + 1))
                known = remember(swarm, scores)
                grew = generation if known.leader_score > swarm.leader_score else grew
                if generation == options.iterations:
                    break
                if options.patience is not None and generation - grew >= options.patience:
                    stopped = f"the best score has not improved for {options.patience} iterations"
                    break
                swarm = move(known, self.layers, options.iterations, options.search_seed)
        return SwarmScores(
            metric=options.metric,
            members=self._names(),
            layers=self.layers,
            generations=tuple(generations),
            evaluations=tuple(_evaluation(position, outcome) for position, outcome in outcomes.items()),
            stopped=stopped,
        )

    def _evaluate(self, new: Sequence[Position], progress: Progress) -> dict[Position, Outcome]:
        """Score these positions, sharing the work with all processes that use the same storage."""
        if not new:
            return {}
        options = self.options
        keys = {position: "-".join(map(str, position)) for position in new}
        jobs = [Job(keys[p], {f"frozen_{j}": k for j, k in enumerate(p)}) for p in new]
        positions = {key: position for position, key in keys.items()}
        outcomes = score_jobs(
            jobs,
            lambda job, report: self.trainings.train(self._start(positions[job.key]), options.search_seed, report),
            lambda: self._plan_recordings(new),
            name="swarm",
            signature=self._signature,
            storage=self._storage,
            halving=options.halving,
            progress=progress,
        )
        return {position: outcomes[key] for position, key in keys.items()}

    def _plan_recordings(self, new: Sequence[Position]) -> None:
        """Announce the borders that will be needed, so that one pass over the samples records all of them."""
        recordings = self.trainings.recordings
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for position in new:
            stage = self._plan_for(position).stages[0]
            trained = set(trained_by(stage, self.model, trainable))
            moving = moving_norms(self.model, stage, trained)
            prefix = recordings.prefix_of(self.model, liveness(self.model, self._chains, trained, moving))
            if prefix is not None:
                recordings.plan(prefix)

    def _start(self, position: Position) -> Run:
        """A copy of the model, prepared to train from these layers on."""
        model = copy.deepcopy(self.model)
        return self.options.start(model, self._plan_for(position))

    def _names(self) -> tuple[str, ...]:
        """Display names of the members: the source names if known and distinct, otherwise the class names."""
        members = self.options.members(self.model)
        known = [getattr(getattr(member, "config", None), "_name_or_path", "") or "" for _, member in members]
        names = [
            name.rstrip("/").rpartition("/")[2] or type(m).__name__ for name, (_, m) in zip(known, members, strict=True)
        ]
        return tuple(name if names.count(name) == 1 else f"{name} ({j})" for j, name in enumerate(names))

    def _bar(self) -> Bar:
        shown = self.context.progress if self.progress is None else self.progress
        visits = self.options.particles * (self.options.iterations + 1)
        return Bar(visits, "Searching layers to freeze", self.options.metric, not shown, " with {} layers frozen")


def _constant(steps: int) -> Callable[[int], float]:
    return lambda step: 1.0


def _fitness(outcome: Outcome) -> float:
    """The score given to a particle: best epoch so far; pruned runs count."""
    if outcome.pruned:
        return max(outcome.steps, default=-math.inf)
    return outcome.value


def _evaluation(position: Position, outcome: Outcome) -> Evaluation:
    return Evaluation(position, _fitness(outcome), epochs_of(outcome), outcome.seconds, outcome.pruned, outcome.steps)
