"""Parameter groups and their learning rates in each stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_ft.core.plan import Plan, Rate, Stage, stage_index, trained_by
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import parameters_under
from hf_ft.models.names import covers
from hf_ft.models.norms import norm_layers

STAGE_RATES = "stage_rates"
FACTOR = "rate_factor"  # of a tensor whose rate is redetermined in each epoch
EPOCH = "rate_epoch"  # for which it was determined


def rate_of(name: str, stage: Stage, base: float) -> float:
    """The learning rate of a parameter in a stage that trains it: the rate with the longest matching name."""
    best: tuple[int, Rate | None] = (-1, None)
    for rate in stage.rates:
        lengths = [len(prefix) for prefix in rate.names if covers(prefix, name)]
        if lengths and max(lengths) > best[0]:
            best = (max(lengths), rate)
    rate_found = best[1]
    if rate_found is None:
        return base
    return rate_found.lr if rate_found.lr is not None else base * rate_found.scale


def ever_trained(plan: Plan, model: nn.Module, trainable: Collection[str]) -> list[str]:
    """Names of the parameters that any stage trains, in the model's order.

    Raises:
        OptionError: if names of a stage match nothing (see :func:`hf_ft.core.plan.trained_by`).
    """
    names = {name for stage in plan.stages for name in trained_by(stage, model, trainable)}
    return [name for name, _ in model.named_parameters() if name in names]


def split_groups(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, plan: Plan, trainable: Collection[str]
) -> list[dict[str, Any]]:
    """Split an optimizer's groups so that each has a single rate in every stage.

    The base rate is the plan's, if it has one, and otherwise the group's ``lr``. If a term replaces the optimizer's
    weight decay, the latter is set to 0. Each new group holds its rates under ``"stage_rates"``, 0 in stages that
    freeze it. Tensors with rates of their own form separate groups, with the factor under ``"rate_factor"``.

    Returns:
        The groups, ordered by their first parameter.

    Raises:
        OptionError: if a rate's names match nothing.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _check_rates(plan, model)
    names_by_stage = [set(trained_by(stage, model, trainable)) for stage in plan.stages]
    decayed_by_terms = (prefix for term in plan.terms for prefix in term.replaces_decay)
    undecayed = {name for name, _ in parameters_under(model, decayed_by_terms)}
    alone = plan.tensor_rates.on if plan.tensor_rates is not None else ()
    new_groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        base = group["lr"] if plan.learning_rate is None else plan.learning_rate
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            rates = tuple(
                rate_of(name, stage, base) if name in stage_names or not name else 0.0
                for stage, stage_names in zip(plan.stages, names_by_stage, strict=True)
            )
            decay = 0.0 if name in undecayed else group.get("weight_decay", 0.0)
            new = {**group, "params": [], "weight_decay": decay, "lr": _first_rate(rates), STAGE_RATES: rates}
            single = bool(name) and any(covers(prefix, name) for prefix in alone)
            new |= {FACTOR: 1.0, EPOCH: -1} if single else {}
            new_groups.setdefault((index, rates, decay, name if single else ""), new)["params"].append(parameter)
    return list(new_groups.values())


def _check_rates(plan: Plan, model: nn.Module) -> None:
    known = {name for found in (model.named_modules(), model.named_parameters()) for name, _ in found}
    for rate in (rate for stage in plan.stages for rate in stage.rates):
        if rate.names and not known.intersection(rate.names):
            raise OptionError(
                f"a strategy sets the learning rate of {', '.join(rate.names)}, which the model does not have: if "
                "another one has renamed it, as adapters do, use one of the two."
            )


def regroup(optimizer: Optimizer, model: nn.Module, plan: Plan, trainable: Collection[str]) -> None:
    """Split an optimizer's groups (see :func:`split_groups`) in place, since a wrapper may hold the list.

    Raises:
        OptionError: if it lacks parameters that the plan trains.
    """
    groups = split_groups(optimizer.param_groups, model, plan, trainable)
    ids = {id(parameter) for group in groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    missing = [name for name in ever_trained(plan, model, trainable) if id(parameters[name]) not in ids]
    if missing:
        raise OptionError(
            f"the optimizer ({type(optimizer).__name__}) lacks {len(missing)} of the parameters that the strategy "
            f"trains, such as {missing[0]!r}: choose another optim, or pass all parameters."
        )
    optimizer.param_groups[:] = groups


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def check_settings(own: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> None:
    """Check that the settings of parameter groups from a checkpoint have the same types as an optimizer's own.

    Raises:
        ValueError: if one is missing or of another type; the message names it.
    """
    for index, (group, other) in enumerate(zip(own, loaded, strict=True)):
        for name, value in group.items():
            if name not in other or not _same_kind(value, other[name]):
                raise ValueError(f"parameter group {index} has {name}={other.get(name)!r}")


def _same_kind(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same_kind, one, other))
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return type(one) is type(other) or (numbers and bool not in (type(one), type(other)))


def undecayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: biases, and those of normalisation layers."""
    norms = [name for name, _ in norm_layers(module)]
    names = [name for name, _ in module.named_parameters()]
    return {name for name in names if name.endswith("bias") or any(covers(norm, name) for norm in norms)}


def decay_groups(module: nn.Module, names: Collection[str], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters of a module into two groups: with and without weight decay."""
    bare, selection = undecayed_names(module), set(names)
    parameters = [(name, parameter) for name, parameter in module.named_parameters() if name in selection]
    return [
        {"params": [p for name, p in parameters if name not in bare], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if name in bare], "lr": lr, "weight_decay": 0.0},
    ]


def term_groups(plan: Plan, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of trainable terms: the same rate in every stage, no decay for biases and norms."""
    modules = plan.term_modules
    names = [name for name, parameter in modules.named_parameters() if parameter.requires_grad]
    lr = lr if plan.learning_rate is None else plan.learning_rate
    rates = (lr,) * len(plan.stages)
    groups = decay_groups(modules, names, lr, weight_decay)
    return [{**group, STAGE_RATES: rates} for group in groups if group["params"]]


def _by_progress(schedule: Callable[[float], float], length: int) -> Callable[[int], float]:
    return lambda step: schedule(min(step / length, 1.0))


def _first_rate(rates: Sequence[float]) -> float:
    return next((rate for rate in rates if rate), 0.0)


def stage_scheduler(
    optimizer: Optimizer,
    stages: Sequence[Stage],
    borders: Sequence[int],
    schedule: Callable[[int], Callable[[int], float]],
) -> LambdaLR:
    """A scheduler for all stages: each stage runs its own schedule from its first step to its last.

    Args:
        optimizer: optimizer with groups from :func:`split_groups`.
        borders: the step at which each stage ends.
        schedule: number of steps -> (step -> factor), for stages that have no schedule of their own.
    """
    begins = [0, *borders[:-1]]
    lengths = [end - begin for begin, end in zip(begins, borders, strict=True)]
    curves = [
        schedule(length) if stage.schedule is None else _by_progress(stage.schedule, length)
        for stage, length in zip(stages, lengths, strict=True)
    ]

    def factor(rates: Sequence[float], first: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            stage = stage_index(borders, step)
            return rates[stage] / first * curves[stage](step - begins[stage]) if first else 0.0

        return at

    return LambdaLR(optimizer, [factor(g[STAGE_RATES], _first_rate(g[STAGE_RATES])) for g in optimizer.param_groups])


def schedule_curve(name: str, steps: int, warmup: int, **kwargs: Any) -> Callable[[int], float]:
    """A Transformers learning-rate schedule as a function of the step.

    Raises:
        OptionError: if it does not depend only on the step (``reduce_lr_on_plateau``, ``greedy``).
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
