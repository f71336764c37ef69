"""The choice among final models: set the weights of each candidate, evaluate them, and keep the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.core.context import State
from hf_ft.core.plan import Plan, Selection
from hf_ft.engine.adapters import AddAdapters
from hf_ft.engine.param_groups import ever_trained
from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.names import covered
from hf_ft.models.norm_statistics import Statistics, renew_statistics, set_statistics, statistics_of
from hf_ft.models.preserve import forget_evaluation
from hf_ft.models.sharding import local

logger = logging.get_logger(__name__)
CHOICE = "choice"  # key in the state of the strategy that chooses


@dataclass(frozen=True, eq=False)
class Origin:
    """What selections need from the model before training, in CPU memory: weights and BatchNorm statistics by name.

    With a sharded model, each process has its own parts.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How final models are evaluated.

    Attributes:
        score: evaluates the model as it is; the same on every process. None if there is no evaluation data.
        greater_is_better: whether higher scores are better.
        metric: name of the score.
        batches: a fresh pass over this process's share of the training data.
        computing: context manager for the model's computations on them, such as autocast.
        reduce: sums a tensor over all processes.
    """

    score: Callable[[], float] | None = None
    greater_is_better: bool = True
    metric: str = "score"
    batches: Callable[[], Iterable[Mapping[str, Any]]] | None = None
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor


def check_selections(plan: Plan, model: nn.Module, trainable: Collection[str]) -> None:
    """Reject selections that have nothing to set.

    Raises:
        OptionError: naming the strategy.
    """
    adapted = isinstance(model, PeftModel) or any(isinstance(step, AddAdapters) for step in plan.surgery)
    for selection in plan.select:
        if adapted:
            raise OptionError(
                f"{selection.name} averages weights, but an adapter's weights are factors of a product, whose averages "
                "are meaningless: merge the adapters and train without them, or leave one of the two out."
            )
        if not _set_by(selection, ever_trained(plan, model, trainable)):
            raise OptionError(
                f"{selection.name} averages {', '.join(selection.anchors)}, of which {plan.owner or 'this run'} trains "
                "nothing: leave it out, or train more of the model."
            )


def origin_of(plan: Plan, model: nn.Module, trainable: Collection[str]) -> Origin | None:
    """The current weights that the selections of a plan refer to; None if it has none."""
    if not plan.select:
        return None
    trained = ever_trained(plan, model, trainable)
    names = {name for selection in plan.select for name in _set_by(selection, trained)}
    weights = {n: local(p.detach()).to("cpu", copy=True) for n, p in model.named_parameters() if n in names}
    return Origin(weights, statistics_of(model))


def select(
    plan: Plan, model: nn.Module, origin: Origin | None, states: Mapping[str, State], judge: Judge
) -> dict[str, State]:
    """Make the choices of a plan; return the states with what was chosen, under ``"choice"``.

    Raises:
        OptionError: if there is nothing to evaluate on, or to measure statistics on.
    """
    states = dict(states)
    for selection in plan.select:
        assert origin is not None
        record = _choose(selection, _Candidates(selection, model, origin, judge), judge)
        state = states.get(selection.name, State())
        states[selection.name] = State(state.tensors, {**state.info, CHOICE: record})
    return states


def choices(states: Mapping[str, State]) -> dict[str, Mapping[str, Any]]:
    """What was chosen, by strategy: the ``value``, the ``metric``, and the ``scores`` of all candidates."""
    return {name: state.info[CHOICE] for name, state in states.items() if CHOICE in state.info}


def _choose(selection: Selection, candidates: _Candidates, judge: Judge) -> dict[str, Any]:
    values = selection.candidates
    if judge.score is None and selection.optional:
        values = values[:1]
    if judge.score is None and len(values) > 1:
        raise OptionError(
            f"{selection.name} chooses among {len(values)} models after training: pass evaluate=... to "
            "Run.finish or Run.select."
        )
    sign = 1.0 if judge.greater_is_better else -1.0
    best, chosen, kept, scores = -math.inf, None, None, []
    try:
        for value in values:
            candidates.set(value)
            score = math.nan if judge.score is None else float(judge.score())
            scores.append((value, score if math.isfinite(score) else None))
            if chosen is None or sign * score > best:
                best = sign * score if math.isfinite(score) else -math.inf
                chosen, kept = value, candidates.statistics()
    except BaseException:
        candidates.as_trained()
        raise
    assert chosen is not None and kept is not None
    candidates.set(chosen, kept)
    if judge.score is not None:
        shown = ", ".join(f"{value:g}: {'nan' if score is None else f'{score:.4f}'}" for value, score in scores)
        logger.info(f"{selection.name}: {chosen:g} has the best {judge.metric} ({shown}).")
    return {"value": chosen, "metric": judge.metric if judge.score else "", "scores": [list(pair) for pair in scores]}


class _Candidates:
    """The models that a selection chooses from, one at a time in the model itself."""

    def __init__(self, selection: Selection, model: nn.Module, origin: Origin, judge: Judge) -> None:
        self._selection, self._model, self._judge = selection, model, judge
        parameters = {n: local(p.detach()) for n, p in model.named_parameters() if n in origin.weights}
        trained = {name: part.to("cpu", copy=True) for name, part in parameters.items()}
        names = [n for n in _set_by(selection, parameters) if not torch.equal(trained[n], origin.weights[n])]
        self._parameters = [parameters[name] for name in names]
        self._starts = [wide(origin.weights[name]) for name in names]
        self._ends = [wide(trained[name]) for name in names]
        now = statistics_of(model)
        self._moved = {n: now[n] for n, old in origin.statistics.items() if n in now and _differ(now[n], old)}

    @torch.no_grad()
    def set(self, value: float, statistics: Statistics | None = None) -> None:
        """Give the model the weights of a candidate, and statistics that fit them: these, or measured ones."""
        weights = list(self._selection.weights(self._starts, self._ends, value))
        if all(map(torch.equal, weights, self._ends)):
            self.as_trained()
            return
        if self._moved and statistics is None and self._judge.batches is None:
            raise OptionError(
                f"{self._selection.name} changes the weights, so the statistics of {len(self._moved)} BatchNorm "
                "layers no longer fit: pass the training data as batches=... to Run.finish or Run.select."
            )
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)
        forget_evaluation(self._model)
        if self._moved and statistics is None:
            assert self._judge.batches is not None
            with self._judge.computing():
                renew_statistics(self._model, self._moved, self._judge.batches(), self._judge.reduce)
        elif self._moved:
            set_statistics(self._model, statistics or {})

    @torch.no_grad()
    def as_trained(self) -> None:
        """Give the model its trained weights and statistics."""
        for parameter, weight in zip(self._parameters, self._ends, strict=True):
            parameter.copy_(weight)
        set_statistics(self._model, self._moved)
        forget_evaluation(self._model)

    def statistics(self) -> Statistics:
        """The current statistics of the layers whose statistics moved in training."""
        return statistics_of(self._model, self._moved)


def over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, if there are several."""
    tensor = tensor.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def _set_by(selection: Selection, names: Iterable[str]) -> list[str]:
    anchors = set(selection.anchors)
    return [name for name in names if covered(name, anchors)]


def _differ(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether the running mean or variance, which come first, differ."""
    return not all(map(torch.equal, one[:2], other[:2]))
