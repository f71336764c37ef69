"""Set up a run: measure, plan, check, and apply surgery."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from hf_ft.core.compose import build_plan, check_composed, check_examples, resolve, shared_option, sharing
from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context, State
from hf_ft.core.plan import CopiesModel, Plan, trained_by
from hf_ft.engine.averaging import RunningAverage
from hf_ft.engine.frozen.reference import Reference
from hf_ft.engine.param_groups import ever_trained
from hf_ft.engine.run import Run
from hf_ft.engine.selection import check_selections, origin_of
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy, is_traced, members_of, parameters_under, unwrap
from hf_ft.models.layouts import Layouts
from hf_ft.models.names import covered
from hf_ft.models.parts import Anatomy, Chain


def set_up(
    model: nn.Module,
    strategy: FTConfig | str | Iterable[FTConfig | str],
    context: Context | None = None,
    states: Mapping[str, State] | None = None,
    place: Callable[[nn.Module], None] = lambda model: None,
) -> Run:
    """Measure, build the plan and apply surgery.

    Args:
        model: a Transformers classifier, or a PEFT model of one.
        strategy: a config, a registered name, or a list of either.
        context: for strategies that measure the data first.
        states: states measured earlier (after a resume); nothing is then measured again.
        place: called with the model after its surgery, before anything refers to its parameters; may shard it.

    Raises:
        OptionError: for any invalid combination, before the model is changed.
    """
    configs = resolve(strategy)
    check_composed(configs)
    if states is None:
        states = measure(configs, model, None if context is None else lambda: context)
    run = start(configs, model, check(configs, model, states, _unfrozen(model)), states, place)
    if context is not None:
        run.find_layouts(context)
    return run


def start(
    configs: tuple[FTConfig, ...],
    model: nn.Module,
    plan: Plan,
    states: Mapping[str, State],
    place: Callable[[nn.Module], None] = lambda model: None,
) -> Run:
    """Apply a plan's surgery, and record the anchors of its terms."""
    unfrozen = _unfrozen(model)
    for operation in plan.surgery:
        model = operation(model)
    trainable = _unfrozen(model)
    chains, layouts = _chains(configs, model, plan, trainable), Layouts()
    place(model)
    anchored = [prefix for term in plan.terms for prefix in term.anchors]
    anchors = {
        name: parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in parameters_under(model, anchored)
        if name in trainable
    }
    compares = any("reference" in term.needs for term in plan.terms)
    for module in plan.term_modules.values():
        if isinstance(module, CopiesModel):
            module.begin(model)
    reference = Reference(model, layouts) if compares else None
    trained = ever_trained(plan, model, trainable)
    average = None if plan.average is None else RunningAverage(model, trained, plan.average)
    origin = origin_of(plan, model, trainable)
    return Run(
        configs, states, plan, model, chains, trainable, anchors, reference, layouts, average, origin, unfrozen=unfrozen
    )


def _unfrozen(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def measure(
    configs: tuple[FTConfig, ...],
    model: nn.Module,
    context: Callable[[], Context] | None,
    known: Mapping[str, State] | None = None,
) -> dict[str, State]:
    """The state of each strategy that measures the data, by ``ft_type``: known, or measured in a fresh context.

    Searches come last: their candidates start from the model as the other strategies change it.
    """
    states: dict[str, State] = {}
    check_examples(configs, model)
    configs = sharing(configs)
    searching = [config for config in configs if config.searches()]
    others = [config for config in configs if config not in searching]
    for config in (*others, *searching):
        if known and config.ft_type in known:
            states[config.ft_type] = known[config.ft_type]
        elif config.measures() and context is not None:
            start_from = _changed(model, others, states) if config in searching else model
            states[config.ft_type] = config.measure(start_from, context())
        elif config.must_measure():
            raise OptionError(f"{config.ft_type} measures the data before training: pass a context, or states.")
    return states


def _changed(model: nn.Module, configs: Iterable[FTConfig], states: Mapping[str, State]) -> nn.Module:
    """A copy of the model after the surgery of these strategies; the model itself if there is none."""
    plans = [config.plan(model, states.get(config.ft_type, State())) for config in configs]
    surgery = dict.fromkeys(operation for plan in plans for operation in plan.surgery)  # equal ones once, as in a run
    changed = copy.deepcopy(model) if surgery else model
    for operation in surgery:
        changed = operation(changed)
    return changed


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
    """Reject an ensemble if a strategy depends on the depth or the head of a single network.

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
    """Whether each stage trains either all of the backbone or none of it, so that its parts do not matter."""
    heads = set(found.head.modules)
    backbone = {name for name in trainable if not covered(name, heads)}
    inside = [backbone.intersection(trained_by(stage, model, trainable)) for stage in plan.stages]
    return all(trained in (set(), backbone) for trained in inside) and not any(term.layers for term in plan.terms)
