"""Search for the most salient block: briefly train every candidate from the same start, and score it.

Reference: Barakat and Huang, "Improving Reliability of Fine-tuning with Block-wise Optimisation",
arXiv:2301.06133. Candidates, baselines and quarters: :mod:`hf_ft.strategies.blockwise.candidates`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn

from hf_ft.core.context import Context
from hf_ft.engine.run import Run
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.weight_layers import weight_layers
from hf_ft.search.evaluate import Bar, SearchOptions, ShortTrainings, epochs_of, score_jobs
from hf_ft.search.trials import Job, Outcome, Report
from hf_ft.strategies.blockwise.candidates import Candidate, baseline_candidates, candidates, top_layers
from hf_ft.strategies.blockwise.scores import BlockScore, BlockScores

STORAGE = "block_search.db"
BASELINES = ("head", "all")
SCORED, MOST_DRAWS = 200, 4  # held-out samples to score by default, and the largest number of draws for it


class BlockOptions(SearchOptions, Protocol):
    """What the search requires of its strategy; implemented by :class:`~hf_ft.BlockwiseConfig`."""

    @property
    def scheme(self) -> str: ...

    @property
    def length(self) -> int: ...

    @property
    def top(self) -> int: ...

    @property
    def head(self) -> str | None: ...

    @property
    def blocks(self) -> str | None: ...

    @property
    def search_seeds(self) -> int | Literal["auto"]: ...

    @property
    def baselines(self) -> bool: ...

    def adaptable(self, model: nn.Module, candidate: Candidate) -> bool:
        """Whether a candidate can be trained."""

    def start(self, model: nn.Module, candidate: Candidate) -> Run:
        """Prepare a model for training one candidate."""


@dataclass
class BlockSearch:
    """Score the candidates of a scheme on a held-out split of the training samples.

    Every candidate starts from the same weights and head, sees the data in the same order, and has the same budget.
    Each additional seed changes the held-out samples, the data order, the dropout and the initial head.

    Trials form an Optuna study: an interrupted search resumes where it stopped, and all processes that run the same
    search on the same storage share the candidates.

    Args:
        model: the pretrained model with a new head; left unchanged.
        options: scheme, budget, metric and storage.
        context: samples and recipe, for instance :meth:`hf_ft.FTTrainer.context`.
        progress: whether to show a progress bar; None for the context's setting.

    Raises:
        OptionError: if an option does not fit the model or the data, or the storage cannot be opened.
        ImportError: if Optuna is not installed.
    """

    model: nn.Module
    options: BlockOptions
    context: Context
    progress: bool | None = None

    def __post_init__(self) -> None:
        options = self.options
        self.trainings = ShortTrainings(
            self.model, self.context, options.metric, options.validation, options.search_epochs
        )
        scheme = "layer" if options.scheme == "top_layers" else options.scheme
        place = {"head": options.head, "blocks": options.blocks}
        blocks = candidates(self.model, scheme, length=options.length, **place)
        self.candidates = [candidate for candidate in blocks if options.adaptable(self.model, candidate)]
        self.baselines = baseline_candidates(self.model, **place) if options.baselines else {}
        self.seeds = tuple(range(self._draws()))
        unused = ("block", "storage", "search_seeds", "top", "baselines")
        settings = {key: value for key, value in options.identity().items() if key not in unused}
        self._signature = self.trainings.describe(settings)

    def _draws(self) -> int:
        wanted = self.options.search_seeds
        return min(MOST_DRAWS, math.ceil(SCORED / len(self.trainings.rows(0)[1]))) if wanted == "auto" else wanted

    # --- the search ----------------------------------------------------------------------------------------

    def run(self) -> BlockScores:
        """Train and score what no earlier or parallel process has done; return all scores."""
        outcomes = self._score([*self.candidates, *self.baselines.values()])
        scores = [self._collect(candidate, outcomes) for candidate in self.candidates]
        if self.options.scheme == "top_layers":
            scores = self._join_best(scores)
        return BlockScores(
            scheme=self.options.scheme,
            metric=self.options.metric,
            layers=len(weight_layers(self.model, self.options.head, self.options.blocks)),
            seeds=self.seeds,
            scores=tuple(scores),
            baselines={name: self._collect(candidate, outcomes) for name, candidate in self.baselines.items()},
        )

    def _join_best(self, layers: Sequence[BlockScore]) -> list[BlockScore]:
        """Scheme (2): train the best k layers jointly, for each k > 1; single layers are already scored."""
        ranked = sorted((s for s in layers if s.ranks), key=lambda s: (s.mean, s.candidate.centre), reverse=True)
        indices = [entry.candidate.layers[0] for entry in ranked[: self.options.top]]
        joined = top_layers(self.model, indices, head=self.options.head, blocks=self.options.blocks)
        outcomes = self._score(joined[1:])
        first = BlockScore(joined[0], ranked[0].scores, False, ranked[0].epochs, ranked[0].seconds)
        return [first, *(self._collect(candidate, outcomes) for candidate in joined[1:])]

    def _score(self, wanted: Sequence[Candidate]) -> dict[str, Outcome]:
        options = self.options
        named = {candidate.name: candidate for candidate in wanted}
        jobs = [
            Job(f"{candidate.name}/seed{seed}", {"block": candidate.name, "seed": seed})
            for seed in self.seeds
            for candidate in wanted
        ]

        def train(job: Job, report: Report) -> list[float]:
            candidate, seed = named[str(job.params["block"])], int(job.params["seed"])
            # Baselines are for comparison and are never pruned.
            stopped = None if candidate.name in BASELINES else report
            return self.trainings.train(self._start(candidate, seed), seed, stopped)

        shown = self.context.progress if self.progress is None else self.progress
        with Bar(len(jobs), "Searching blocks", options.metric, not shown) as bar:
            return score_jobs(
                jobs,
                train,
                lambda: self.trainings.plan_recordings(self._start(candidate, 0) for candidate in wanted),
                name=f"blocks-{options.scheme}",
                signature=self._signature,
                storage=self.trainings.storage(options.storage, STORAGE),
                halving=options.halving,
                progress=bar,
            )

    def _start(self, candidate: Candidate, seed: int) -> Run:
        """A copy of the model with this seed's head, prepared for training this candidate."""
        model: Any = copy.deepcopy(self.model)
        if seed and hasattr(model, "_init_weights"):
            with random_states_kept(seed):
                for name in self.options.anatomy(model).head.modules:
                    model.get_submodule(name).apply(lambda module: _redraw(module, model))
        return self.options.start(model, candidate)

    def _collect(self, candidate: Candidate, found: dict[str, Outcome]) -> BlockScore:
        outcomes = [found[f"{candidate.name}/seed{seed}"] for seed in self.seeds]
        return BlockScore(
            candidate,
            tuple(outcome.value for outcome in outcomes),
            any(outcome.pruned for outcome in outcomes),
            sum(map(epochs_of, outcomes)),
            sum(outcome.seconds for outcome in outcomes),
        )


def _redraw(module: nn.Module, model: Any) -> None:
    """Draw a module's weights as Transformers initialises them; zeros stay, since another strategy set them."""
    own = list(module.parameters(recurse=False))
    if own and not any(bool(weight.any()) for weight in own):
        return
    marked: list[Any] = [module, *own, *module.buffers(recurse=False)]
    for item in marked:  # Transformers skips the initialisation of what was loaded
        item._is_hf_initialized = False
    model._init_weights(module)
