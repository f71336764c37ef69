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

FORWARD = 1 / 3  # of a pass, if it cannot be counted: the backward pass computes two products for each of its products
STEP = 4  # number of samples in the step whose work is counted


@dataclass
class Budget:
    """How many passes are allowed, and how many have been made.

    Attributes:
        allowed: in total.
        spent: on the choice so far.
        finishing: reserved for the training that follows.
    """

    allowed: float
    spent: float = 0.0
    finishing: float = 0.0

    def fits(self, passes: float, finishing: float = 0.0) -> bool:
        """Whether this many more can be made if the training that follows may need ``finishing``."""
        return self.spent + passes + max(self.finishing, finishing) <= self.allowed * (1 + 1e-9)


@dataclass
class Costs:
    """The cost of training a model, relative to full fine-tuning.

    Attributes:
        recipe: the training recipe.
        batches: the samples, with the recorded activations that all training runs share.
        full: work of full fine-tuning per sample; 0 until its run is known.
        forward: the forward pass's share of it.
    """

    recipe: Recipe
    batches: Batches
    full: float = 0.0
    forward: float = FORWARD
    rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = list(range(min(STEP, self.batches.samples.count)))

    def set_full(self, model: nn.Module, run: Run) -> None:
        """Count the work of a full fine-tuning run."""
        self.full = training_work(run, self.recipe, self.batches, self.rows)
        copied = copy.deepcopy(model)
        with random_states_kept(0), torch.no_grad(), evaluating(copied), Work() as work, self.recipe.computing():
            batch = self.batches.samples.read(self.rows)
            self.recipe.task_loss(copied, batch)
        self.forward = work.total / len(self.rows) / self.full if self.full else FORWARD

    def ratio(self, run: Run) -> float:
        """The cost of a training run, in passes per sample and epoch."""
        return training_work(run, self.recipe, self.batches, self.rows) / self.full if self.full else 1.0

    def guessed(self, config: FTConfig) -> float:
        """The same before its run is known, from the cost that a strategy declares; rather too high than too low."""
        cost = advising.EVERYTHING if config.cost is None else config.cost
        if cost <= advising.HEAD_ALONE:
            return self.forward
        if cost <= advising.PART_OF_THE_RUN:
            return (1 + self.forward) / 2
        return 1 + self.forward if cost >= advising.WITH_A_FROZEN_COPY else 1.0

    def measuring(self, config: FTConfig, samples: int) -> float:
        """The passes that a strategy's measurement takes, from the cost that it declares."""
        cost = advising.EVERYTHING if config.cost is None else config.cost
        if not config.measures():
            return 0.0
        if cost >= advising.WITH_A_TRAINING_BEFORE:
            return 3 * self.forward * samples
        passed = samples if cost >= advising.WITH_A_PASS_BEFORE else 0
        return self.forward * (passed + min(samples, LOOKED_AT))  # and a look at the head's features

    def advising(self, samples: int) -> float:
        """The passes that ``hf-ft advise`` takes."""
        seen = min(samples, LIMIT)
        return self.forward * seen + min(seen, BATCH * GRADIENT_BATCHES)
