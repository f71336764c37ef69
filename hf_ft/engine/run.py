"""A run: strategies set up for a model. The Trainer and hand-written training loops share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.utils import logging

from hf_ft.core.compose import build_plan, check_composed, resolve, shared_option
from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context, Recipe, Samples, State
from hf_ft.core.plan import CopiesModel, Plan, Term, stage_borders, stage_index, trained_by
from hf_ft.core.task_loss import TaskLoss
from hf_ft.engine.averaging import RunningAverage, averaged
from hf_ft.engine.frozen.reference import Reference
from hf_ft.engine.momentum import schedules_momentum, set_momentum
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import decay_groups, ever_trained, split_groups, stage_scheduler, term_groups
from hf_ft.engine.selection import Judge, Origin, check_selections, origin_of, over_processes, select
from hf_ft.engine.step_hooks import attach, check_not_needed
from hf_ft.engine.tensor_rates import find_rates
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy, is_traced, members_of, unwrap
from hf_ft.models.find_layouts import laid_out, look_at
from hf_ft.models.layouts import Layouts
from hf_ft.models.names import covered, covers
from hf_ft.models.parts import Anatomy, Chain
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.redraw import redraw
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
        chains: its parts in forward order; empty where they are unknown and not needed.
        trainable: names of the parameters that were not frozen before.
        anchors: initial values of the parameters that terms anchor.
        reference: the initial model, if a term compares with it.
        layouts: how the terms' layers lay out their outputs, once known.
        average: the running average of the weights, if the plan has one.
        origin: initial values that the plan's selections refer to.
        selected: whether these have been made.
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

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that any stage trains."""
        return ever_trained(self.plan, self.model, self.trainable)

    def find_layouts(self, context: Context) -> None:
        """Find how the terms' layers lay out their outputs, on two samples; otherwise, the first batch tells."""
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

        Where the plan has rates of tensors, call its ``begin_epoch`` before the first step of each epoch.

        Args:
            then: called with the objective at the start of each stage.
            optimizer: for stages that want a fresh one or schedule its momentum, for changes of gradients and rates,
                and for a running average of the weights, which is updated after each of its steps.

        Raises:
            OptionError: if the plan changes gradients or rates, or averages the weights, and no optimizer is given.
        """
        if optimizer is None and self.average is not None:
            raise OptionError(
                "a strategy averages the weights over the optimizer's steps: pass optimizer=... to stepper()."
            )
        if optimizer is None and any(stage.fresh_optimizer for stage in self.plan.stages[1:]):
            logger.warning_once(
                f"{self.plan.owner}: a stage wants a fresh optimizer: pass optimizer=... to stepper(), or the state of "
                "earlier stages is kept."
            )
        if optimizer is None:
            check_not_needed(self.plan)
        if optimizer is None and schedules_momentum(self.plan.stages):
            logger.warning_once(
                f"{self.plan.owner}: a stage schedules the momentum: pass optimizer=... to stepper(), or the optimizer "
                "keeps its own."
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
        """A context to evaluate or save in: the average is in the place of the weights, if the plan has one."""
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
            batches: the training data, where BatchNorm statistics are to be measured: this process's share, which can
                be iterated repeatedly.
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
        return model


@dataclass(eq=False)
class Stepper:
    """Advances an objective through its plan's stages; call it before each optimizer step with the step's index.

    Attributes:
        borders: the step at which each stage ends.
        then: called with the objective at the start of each stage.
        optimizer: its state is dropped at the first step of a later stage that wants a fresh optimizer, and its
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
        """Find the rates of the tensors for an epoch, unless they have been found; call it before its first step.

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
            self.stage = index
            stage = self.objective.plan.stages[index]
            self.objective.enter(stage)
            if index and step == self.borders[index - 1]:  # not where a run is resumed within the stage
                if stage.fresh_optimizer and self.optimizer is not None:
                    self.optimizer.state.clear()
                redraw(self.objective.model, unwrap(self.objective.model)[0], stage.redraws, index)
                if average is not None and stage.redraws:
                    average.begin()
            if self.then is not None:
                self.then(self.objective)


def set_up(
    model: nn.Module,
    strategy: FTConfig | str | Iterable[FTConfig | str],
    context: Context | None = None,
    states: Mapping[str, State] | None = None,
) -> Run:
    """Measure, build the plan and apply surgery.

    Args:
        model: a Transformers classifier, or a PEFT model of one.
        strategy: a config, a registered name, or a list of either.
        context: for strategies that measure the data first.
        states: states measured earlier (after a resume); nothing is measured again then.

    Raises:
        OptionError: for any invalid combination, before the model is changed.
    """
    configs = resolve(strategy)
    check_composed(configs)
    if states is None:
        states = measure(configs, model, None if context is None else lambda: context)
    trainable = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    run = start(configs, model, check(configs, model, states, trainable), states)
    if context is not None:
        run.find_layouts(context)
    return run


def start(configs: tuple[FTConfig, ...], model: nn.Module, plan: Plan, states: Mapping[str, State]) -> Run:
    """Apply a plan's surgery, and record the anchors of its terms."""
    for operation in plan.surgery:
        model = operation(model)
    trainable = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    anchor_names = [prefix for term in plan.terms for prefix in term.anchors]
    anchors = {
        name: parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in model.named_parameters()
        if name in trainable and any(covers(prefix, name) for prefix in anchor_names)
    }
    compares = any("reference" in term.needs for term in plan.terms)
    for module in plan.term_modules.values():
        if isinstance(module, CopiesModel):
            module.begin(model)
    chains, layouts = _chains(configs, model, plan, trainable), Layouts()
    reference = Reference(model, layouts) if compares else None
    trained = ever_trained(plan, model, trainable)
    average = None if plan.average is None else RunningAverage(model, trained, plan.average)
    origin = origin_of(plan, model, trainable)
    return Run(configs, states, plan, model, chains, trainable, anchors, reference, layouts, average, origin)


def measure(
    configs: Iterable[FTConfig],
    model: nn.Module,
    context: Callable[[], Context] | None,
    known: Mapping[str, State] | None = None,
) -> dict[str, State]:
    """The state of each strategy that measures the data, by ``ft_type``: known, or measured in a fresh context."""
    states = {}
    for config in configs:
        if known and config.ft_type in known:
            states[config.ft_type] = known[config.ft_type]
        elif config.measures() and context is not None:
            states[config.ft_type] = config.measure(model, context())
        elif config.must_measure():
            raise OptionError(f"{config.ft_type} measures the data before training: pass a context, or states.")
    return states


def check(
    configs: tuple[FTConfig, ...], model: nn.Module, states: Mapping[str, State], trainable: tuple[str, ...]
) -> Plan:
    """Build the plan and run all pre-training checks."""
    if not trainable:
        raise OptionError(
            "all parameters of the model are frozen (requires_grad=False), so there is nothing to train: unfreeze some."
        )
    check_members(configs, model)
    for config in configs:
        config.check_model(model)
    plan = build_plan(configs, model, states)
    ever_trained(plan, model, trainable)  # raises if names of a stage match nothing
    check_selections(plan, model, trainable)
    _chains(configs, model, plan, trainable)
    return plan


def check_members(configs: Iterable[FTConfig], model: nn.Module) -> None:
    """Reject an ensemble where a strategy depends on the depth or the head of a single network.

    Raises:
        OptionError: if there is one; the message names the strategy.
    """
    members = members_of(unwrap(model)[0])
    unfit = [config.ft_type for config in configs if not config.needs().several_members]
    if unfit and len(members) > 1:
        raise OptionError(
            f"{unfit[0]} needs the layers and the head of a single network, but this model has {len(members)} members: "
            "use it with one of them (model.members[0])."
        )


def schedule_curve(name: str, steps: int, warmup: int, **kwargs: Any) -> Callable[[int], float]:
    """A Transformers learning-rate schedule as a function of the step.

    Raises:
        OptionError: if it does not depend on the step alone (``reduce_lr_on_plateau``, ``greedy``).
    """
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        scheduler = get_scheduler(name, dummy, min(warmup, steps), steps, scheduler_specific_kwargs=kwargs or None)
    except TypeError as error:
        raise OptionError(
            f"lr_scheduler_type={getattr(name, 'value', name)!r}, lr_scheduler_kwargs={kwargs}: {error}"
        ) from error
    if not isinstance(scheduler, LambdaLR):
        raise OptionError(
            f"lr_scheduler_type={getattr(name, 'value', name)!r} is not a function of the step, so it cannot run once "
            "per stage. Use linear, cosine, constant, polynomial, ... or a strategy with one stage."
        )
    return scheduler.lr_lambdas[0]


def _counts(term: Term, begin: float, end: float) -> bool:
    """Whether a term has a non-zero weight at some point of a stage."""
    times = (begin + (end - begin) * share for share in (0.0, 0.25, 0.5, 0.75))
    return term.weight != 0 and (term.schedule is None or any(term.schedule(max(0.0, time)) != 0 for time in times))


def _chains(
    configs: tuple[FTConfig, ...], model: nn.Module, plan: Plan, trainable: tuple[str, ...]
) -> tuple[Chain, ...]:
    everything = sum(1 for _ in model.parameters())
    needs_chains = any(term.layers or {"features", "logit_inputs"} & term.needs for term in plan.terms)
    needs_chains |= any(len(ever_trained(Plan(stages=(s,)), model, trainable)) < everything for s in plan.stages)
    if not needs_chains:  # so that plain fine-tuning works on models of unknown anatomy
        return ()
    head, blocks = shared_option(configs, "head"), shared_option(configs, "blocks")
    found = anatomy(model, head=head, blocks=blocks)
    if is_traced(model) and _head_or_all(found, model, plan, trainable):
        return found.coarse_chains
    return found.chains


def _head_or_all(found: Anatomy, model: nn.Module, plan: Plan, trainable: tuple[str, ...]) -> bool:
    """Whether each stage trains all of the backbone or nothing of it, so that its parts do not matter."""
    heads = set(found.head.modules)
    backbone = {name for name in trainable if not covered(name, heads)}
    inside = [backbone.intersection(trained_by(stage, model, trainable)) for stage in plan.stages]
    return all(trained in (set(), backbone) for trained in inside) and not any(term.layers for term in plan.terms)
