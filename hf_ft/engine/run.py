"""A run: strategies set up for a model. The Trainer and hand-written training loops share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging

from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context, State
from hf_ft.core.plan import Plan, Term, stage_borders
from hf_ft.core.task_loss import TaskLoss
from hf_ft.engine.averaging import RunningAverage, averaged
from hf_ft.engine.frozen.reference import Reference
from hf_ft.engine.momentum import schedules_momentum
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import (
    decay_groups,
    ever_trained,
    schedule_curve,
    split_groups,
    stage_scheduler,
    term_groups,
)
from hf_ft.engine.selection import Judge, Origin, over_processes, select
from hf_ft.engine.step_hooks import check_not_needed
from hf_ft.engine.stepper import Stepper
from hf_ft.errors import OptionError
from hf_ft.models.find_layouts import laid_out, look_at
from hf_ft.models.layouts import Layouts
from hf_ft.models.parts import Chain
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.source_head import drop_source_head

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """Strategies set up for one model.

    Attributes:
        configs: the strategies.
        states: the measured state of each, by ``ft_type``.
        plan: their composed plan.
        model: the model after surgery (the same object if nothing had to be replaced).
        chains: its parts in forward order; empty if they are unknown and not needed.
        trainable: names of the parameters that surgery left trainable.
        anchors: initial values of the parameters that terms anchor.
        reference: the initial model, if a term compares with it.
        layouts: how the terms' layers lay out their outputs, once known.
        average: the running average of the weights, if the plan has one.
        origin: initial values that the plan's selections refer to.
        selected: whether these have been made.
        unfrozen: names of the parameters that were not frozen before surgery.
    """

    configs: tuple[FTConfig, ...]
    states: Mapping[str, State]
    plan: Plan
    model: nn.Module
    chains: tuple[Chain, ...]
    trainable: tuple[str, ...]
    anchors: Mapping[str, Tensor]
    reference: Reference | None = None
    layouts: Layouts = field(default_factory=Layouts)
    average: RunningAverage | None = None
    origin: Origin | None = None
    selected: bool = False
    unfrozen: tuple[str, ...] = ()

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that any stage trains."""
        return ever_trained(self.plan, self.model, self.trainable)

    def find_layouts(self, context: Context) -> None:
        """Determine how the terms' layers lay out their outputs, on two samples; otherwise, on the first batch."""
        layers = laid_out(layer for term in self.plan.terms for layer in term.layers)
        if layers and context.samples.count:
            with random_states_kept(), context.recipe.computing():
                some = context.samples.read(list(range(min(2, context.samples.count))))
                look_at(self.layouts, self.model, layers, some)

    def objective(self, task_loss: TaskLoss | None = None) -> Objective:
        """The loss as a module, ready to be wrapped: in its first stage, except for ``requires_grad``.

        Every parameter that is ever trained requires a gradient, since DDP registers these when it wraps; the first
        call of :meth:`stepper` freezes those that the first stage does not train.
        """
        start = self.anchors, task_loss, self.reference, self.layouts, self.average
        objective = Objective(self.model, self.plan, self.chains, self.trainable, *start)
        active: set[str] = set()
        end = 1.0
        for stage in reversed(self.plan.stages):  # so that the first one is entered last
            objective.enter(stage)
            active |= {term.name for term in objective.terms if _counts(term, end - stage.duration, end)}
            end -= stage.duration
        idle = [term.name for term in self.plan.terms if term.name not in active]
        if idle:
            logger.warning_once(
                f"{', '.join(idle)} has no effect: in every stage, all its inputs are frozen, or its weight is 0."
            )
        self.unfreeze()
        return objective

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for any torch optimizer: every trained parameter, no decay for norms and biases."""
        groups = decay_groups(self.model, self.trained, lr, weight_decay)
        return [
            *split_groups(groups, self.model, self.plan, self.trainable),
            *term_groups(self.plan, lr, weight_decay),
        ]

    def scheduler(self, optimizer: Optimizer, total_steps: int, name: str = "linear", warmup: float = 0.0) -> LambdaLR:
        """The Transformers schedule ``name``, once per stage; ``warmup`` is a fraction of each stage.

        Neither applies in stages that have a schedule of their own.
        """
        stages = self.plan.stages
        return stage_scheduler(
            optimizer,
            stages,
            stage_borders(stages, total_steps),
            lambda steps: schedule_curve(name, steps, round(warmup * steps)),
        )

    def stepper(
        self,
        objective: Objective,
        total_steps: int,
        then: Callable[[Objective], None] | None = None,
        optimizer: Optimizer | None = None,
    ) -> Stepper:
        """Return a function that switches stages; call it before each optimizer step with the step's index (from 0).

        If the plan has rates of tensors, call its ``begin_epoch`` before the first step of each epoch.

        Args:
            then: called with the objective at the start of each stage.
            optimizer: needed for stages that require a fresh one or schedule its momentum, for changes of gradients and
                rates, and for a running average of the weights, which is updated after each of its steps.

        Raises:
            OptionError: if the plan changes gradients or rates, or averages the weights, and no optimizer is given.
        """
        if optimizer is None and self.average is not None:
            raise OptionError(
                "a strategy averages the weights over the optimizer's steps: pass optimizer=... to stepper()."
            )
        if optimizer is None and any(stage.fresh_optimizer for stage in self.plan.stages[1:]):
            logger.warning_once(
                f"{self.plan.owner}: a stage requires a fresh optimizer: pass optimizer=... to stepper(); otherwise "
                "the state of earlier stages is kept."
            )
        if optimizer is None:
            check_not_needed(self.plan)
        if optimizer is None and schedules_momentum(self.plan.stages):
            logger.warning_once(
                f"{self.plan.owner}: a stage schedules the momentum: pass optimizer=... to stepper(); otherwise the "
                "optimizer keeps its own."
            )
        return Stepper(objective, stage_borders(self.plan.stages, total_steps), then, optimizer)

    def unfreeze(self) -> None:
        """Require gradients for exactly the parameters that any stage trains."""
        self._require_gradients(self.trained)

    def thaw(self) -> None:
        """Restore the initial ``requires_grad``: which parameters train is up to each stage."""
        self._require_gradients(self.trainable)

    def _require_gradients(self, names: Iterable[str]) -> None:
        selection = set(names)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in selection)

    def averaged(self) -> AbstractContextManager[None]:
        """A context for evaluating or saving: the average is in place of the weights, if the plan has one."""
        return averaged(self.average)

    def select(
        self,
        evaluate: Callable[[nn.Module], float] | None = None,
        batches: Iterable[Mapping[str, Any]] | None = None,
        greater_is_better: bool = True,
    ) -> Run:
        """Make the plan's choices among final models; the run's states hold what was chosen.

        Args:
            evaluate: scores the model on evaluation data; the same on every process.
            batches: the training data, if BatchNorm statistics must be measured: this process's share, which can be
                iterated repeatedly.
            greater_is_better: whether higher scores are better.

        Raises:
            OptionError: if a choice needs one of them.
        """
        score = None if evaluate is None else partial(evaluate, self.model)
        given = None if batches is None else lambda: batches
        judge = Judge(score=score, greater_is_better=greater_is_better, batches=given, reduce=over_processes)
        return self.select_by(judge)

    def select_by(self, judge: Judge) -> Run:
        """Make the plan's choices; the run's states hold what was chosen."""
        if self.average is not None:
            self.average.finish()
        states = select(self.plan, self.model, self.origin, self.states, judge)
        return dataclasses.replace(self, states=states, selected=True)

    def finish(
        self,
        evaluate: Callable[[nn.Module], float] | None = None,
        batches: Iterable[Mapping[str, Any]] | None = None,
        greater_is_better: bool = True,
    ) -> nn.Module:
        """The final model: averaged, chosen (:meth:`select`), without a source head, and after ``finalise``."""
        if self.average is not None:
            self.average.finish()
        if self.plan.select and not self.selected:
            self.select(evaluate, batches, greater_is_better)
        self.thaw()
        model = drop_source_head(self.model)
        for operation in self.plan.finalise:
            model = operation(model)
        for name, parameter in model.named_parameters():
            if name in self.unfrozen:  # merged adapters leave the weights frozen
                parameter.requires_grad_(True)
        return model


def _counts(term: Term, begin: float, end: float) -> bool:
    """Whether a term has a non-zero weight at some point of a stage."""
    times = (begin + (end - begin) * share for share in (0.0, 0.25, 0.5, 0.75))
    return term.weight != 0 and (term.schedule is None or any(term.schedule(max(0.0, time)) != 0 for time in times))
