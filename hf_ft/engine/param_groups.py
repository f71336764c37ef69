"""Learning rates: which parameter group gets which rate in which stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_ft.core.plan import Plan, Rate, Stage, stage_index, trained_by
from hf_ft.errors import OptionError
from hf_ft.models.names import Names, covers
from hf_ft.models.norms import norm_layers

STAGE_RATES = "stage_rates"


def rate_of(name: str, stage: Stage, base: float) -> float:
    """The learning rate of a parameter that trains in a stage: the rate with the longest matching name."""
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
    """Names of the parameters that some stage trains, in the model's order.

    Raises:
        OptionError: a stage's names match nothing (see :func:`hf_ft.core.plan.trained_by`).
    """
    trained = {name for stage in plan.stages for name in trained_by(stage, model, trainable)}
    return [name for name, _ in model.named_parameters() if name in trained]


def split_groups(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, plan: Plan, trainable: Collection[str]
) -> list[dict[str, Any]]:
    """Split an optimizer's groups so that each has one rate in every stage.

    A group's own ``lr`` is the base rate. Where a term stands in for the optimizer's decay, that becomes 0.
    Each new group holds its rates under ``"stage_rates"``, 0 where it is frozen.

    Returns:
        The groups, in the order of their first parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [set(trained_by(stage, model, trainable)) for stage in plan.stages]
    undecayed: Names = tuple(prefix for term in plan.terms for prefix in term.replaces_decay)
    split: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            rates = tuple(
                rate_of(name, stage, group["lr"]) if name in chosen or not name else 0.0
                for stage, chosen in zip(plan.stages, trained, strict=True)
            )
            decay = 0.0 if any(covers(prefix, name) for prefix in undecayed) else group.get("weight_decay", 0.0)
            new = {**group, "params": [], "weight_decay": decay, "lr": _first_rate(rates), STAGE_RATES: rates}
            split.setdefault((index, rates, decay), new)["params"].append(parameter)
    return list(split.values())


def regroup(optimizer: Optimizer, model: nn.Module, plan: Plan, trainable: Collection[str]) -> None:
    """Split the groups of an optimizer (see :func:`split_groups`) in place: a wrapper of it may hold the list.

    Raises:
        OptionError: it lacks parameters that the plan trains.
    """
    groups = split_groups(optimizer.param_groups, model, plan, trainable)
    held = {id(parameter) for group in groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    missing = [name for name in ever_trained(plan, model, trainable) if id(parameters[name]) not in held]
    if missing:
        raise OptionError(
            f"the optimizer ({type(optimizer).__name__}) does not hold {len(missing)} of the parameters "
            f"that the strategy trains, such as {missing[0]!r}: choose another optim, or pass all parameters."
        )
    optimizer.param_groups[:] = groups


def undecayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters that never decay: biases, and all of normalisation layers."""
    norms = [name for name, _ in norm_layers(module)]
    names = [name for name, _ in module.named_parameters()]
    return {name for name in names if name.endswith("bias") or any(covers(norm, name) for norm in norms)}


def decay_groups(module: nn.Module, names: Collection[str], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Some parameters of a module in two groups: those that decay, and those that never do."""
    bare, chosen = undecayed_names(module), set(names)
    named = [(name, parameter) for name, parameter in module.named_parameters() if name in chosen]
    return [
        {"params": [p for name, p in named if name not in bare], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in bare], "lr": lr, "weight_decay": 0.0},
    ]


def term_groups(plan: Plan, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the terms that train: at one rate in every stage, biases and norms undecayed."""
    modules = plan.term_modules
    learned = [name for name, parameter in modules.named_parameters() if parameter.requires_grad]
    rates = (lr,) * len(plan.stages)
    groups = decay_groups(modules, learned, lr, weight_decay)
    return [{**group, STAGE_RATES: rates} for group in groups if group["params"]]


def _first_rate(rates: Sequence[float]) -> float:
    return next((rate for rate in rates if rate), 0.0)


def stage_scheduler(
    optimizer: Optimizer, borders: Sequence[int], schedule: Callable[[int], Callable[[int], float]]
) -> LambdaLR:
    """One scheduler for all stages: each stage runs its own schedule from its first step to its last.

    Args:
        optimizer: with groups from :func:`split_groups`.
        borders: the step at which each stage ends.
        schedule: number of steps -> (step -> factor), the schedule of one stage.
    """
    begins = [0, *borders[:-1]]
    curves = [schedule(end - begin) for begin, end in zip(begins, borders, strict=True)]

    def factor(rates: Sequence[float], first: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            stage = stage_index(borders, step)
            return rates[stage] / first * curves[stage](step - begins[stage]) if first else 0.0

        return at

    return LambdaLR(optimizer, [factor(g[STAGE_RATES], _first_rate(g[STAGE_RATES])) for g in optimizer.param_groups])
