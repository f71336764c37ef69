"""Moving from stage to stage, and what happens at each step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from hf_ft.core.context import Recipe, Samples
from hf_ft.core.plan import stage_index
from hf_ft.engine.momentum import set_momentum
from hf_ft.engine.objective import Objective
from hf_ft.engine.step_hooks import attach
from hf_ft.engine.tensor_rates import find_rates
from hf_ft.models.anatomy import unwrap
from hf_ft.models.redraw import redraw
from hf_ft.models.sharding import refresh


@dataclass(eq=False)
class Stepper:
    """Advances an objective through its plan's stages; call it before each optimizer step with the step's index.

    Attributes:
        borders: the step at which each stage ends.
        then: called with the objective at the start of each stage.
        optimizer: its state is dropped at the first step of a later stage that requires a fresh optimizer, and its
            momentum follows the stage's schedule; a running average of the weights follows it.
        stage: index of the current stage; -1 before the first.
        left: number of its steps that remained at the last call.
        step: the step of the last call.
    """

    objective: Objective
    borders: Sequence[int]
    then: Callable[[Objective], None] | None = None
    optimizer: Optimizer | None = None
    stage: int = -1
    left: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            self.attach(self.optimizer)

    def attach(self, optimizer: Optimizer) -> None:
        """Let the plan change each step of this optimizer."""
        self.optimizer = optimizer
        attach(optimizer, self.objective.model, self.objective.plan, lambda: self.step)

    def begin_epoch(self, epoch: int, samples: Samples, recipe: Recipe, **shared: Any) -> None:
        """Determine the rates of the tensors for an epoch, unless already done; call it before its first step.

        Args:
            epoch: number of the epoch, from 0.
            samples: training samples.
            recipe: sizes of batches, task loss and autocast.
            **shared: see :func:`hf_ft.engine.tensor_rates.find_rates`.
        """
        if self.optimizer is not None:
            find_rates(self.objective, self.optimizer, epoch, samples, recipe, **shared)

    def __call__(self, step: int) -> None:
        self.objective.progress = step / self.borders[-1]
        index = stage_index(self.borders, step)
        self.step, self.left = step, self.borders[index] - step
        average = self.objective.average
        if average is not None and self.stage < 0:
            average.start(step, self.optimizer)
        if self.optimizer is not None:
            begin = self.borders[index - 1] if index else 0
            set_momentum(self.optimizer, self.objective.plan.stages, index, (step - begin) / (step - begin + self.left))
        if index != self.stage:
            later, self.stage = self.stage >= 0, index
            stage = self.objective.plan.stages[index]
            self.objective.enter(stage)
            if later:  # the first forward pass does the same
                refresh(self.objective.model)
            if index and step == self.borders[index - 1]:  # not if a run is resumed within the stage
                if stage.fresh_optimizer and self.optimizer is not None:
                    self.optimizer.state.clear()
                redraw(self.objective.model, unwrap(self.objective.model)[0], stage.redraws, index)
                if average is not None and stage.redraws:
                    average.begin()
            if self.then is not None:
                self.then(self.objective)
