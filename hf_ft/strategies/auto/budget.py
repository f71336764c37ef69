"""What choosing and training cost, in passes: a pass trains all layers on one sample once.

Work is counted in floating-point operations, so it is the same on every machine and for any number of processes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_ft.advice.measure import BATCH, GRADIENT_BATCHES, LIMIT
from hf_ft.core import FTConfig, Recipe, advising
from hf_ft.core.head_rate import LOOKED_AT
from hf_ft.engine.run import Run
from hf_ft.engine.short_training import Batches
from hf_ft.engine.work import Work, training_work
from hf_ft.models.preserve import evaluating, random_states_kept

FORWARD = 1 / 3  # of a pass, where it cannot be counted: the backward pass computes two products for each
STEP = 4  # samples whose step is counted


@dataclass
class Budget:
    """The passes that may be made in all, and those that were.

    Attributes:
        allowed: in all.
        spent: on the choice so far.
        finishing: what is set aside for the training that follows.
    """

    allowed: float
    spent: float = 0.0
    finishing: float = 0.0

    def fits(self, passes: float, finishing: float = 0.0) -> bool:
        """Whether so many more can be made, if the training that follows may need ``finishing``."""
        return self.spent + passes + max(self.finishing, finishing) <= self.allowed * (1 + 1e-9)


@dataclass
class Costs:
    """The cost of trainings on a model, relative to full fine-tuning.

    Attributes:
        recipe: the training recipe.
        batches: the samples, with the recorded activations that all trainings share.
        full: work of full fine-tuning per sample; 0 until its run is known.
        forward: the share of it that a forward pass makes up.
    """

    recipe: Recipe
    batches: Batches
    full: float = 0.0
    forward: float = FORWARD
    rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = list(range(min(STEP, self.batches.samples.count)))

    def set_full(self, model: nn.Module, run: Run) -> None:
        """Count what a run of full fine-tuning costs."""
        self.full = training_work(run, self.recipe, self.batches, self.rows)
        copied = copy.deepcopy(model)
        with random_states_kept(0), torch.no_grad(), evaluating(copied), Work() as work, self.recipe.computing():
            batch = self.batches.samples.read(self.rows)
            self.recipe.task_loss(copied, batch)
        self.forward = work.total / len(self.rows) / self.full if self.full else FORWARD

    def ratio(self, run: Run) -> float:
        """The cost of a training, in passes per sample and epoch."""
        return training_work(run, self.recipe, self.batches, self.rows) / self.full if self.full else 1.0

    def guessed(self, config: FTConfig) -> float:
        """The same before its run is known, by the cost that a strategy declares; rather too high."""
        cost = advising.EVERYTHING if config.cost is None else config.cost
        if cost <= advising.HEAD_ALONE:
            return self.forward
        if cost <= advising.PART_OF_THE_RUN:
            return (1 + self.forward) / 2
        return 1 + self.forward if cost >= advising.WITH_A_FROZEN_COPY else 1.0

    def measuring(self, config: FTConfig, samples: int) -> float:
        """The passes of a strategy's measurement, by the cost that it declares."""
        cost = advising.EVERYTHING if config.cost is None else config.cost
        if not config.measures():
            return 0.0
        if cost >= advising.WITH_A_TRAINING_BEFORE:
            return 3 * self.forward * samples
        passed = samples if cost >= advising.WITH_A_PASS_BEFORE else 0
        return self.forward * (passed + min(samples, LOOKED_AT))  # and a look at the head's features

    def advising(self, samples: int) -> float:
        """The passes of ``hf-ft advise``."""
        seen = min(samples, LIMIT)
        return self.forward * seen + min(seen, BATCH * GRADIENT_BATCHES)
