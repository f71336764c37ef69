"""Compose several strategies into one plan."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_ft.core.config import FTConfig, config_class, strategies
from hf_ft.core.context import State
from hf_ft.core.options import options
from hf_ft.core.plan import EVERYTHING, NormMode, Plan, Rate, Stage, Stream, sets_weights
from hf_ft.core.recommended import ADAM, CHOSEN, SGD, LearningRate, Recommended
from hf_ft.errors import OptionError
from hf_ft.models.names import covers
from hf_ft.models.norms import batch_norms, tensorflow_momentum

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SetBatchNormMomentum:
    """Surgery that sets the momentum of the named BatchNorm layers."""

    names: tuple[str, ...]
    momentum: float

    def __call__(self, model: nn.Module) -> nn.Module:
        for name in self.names:
            model.get_submodule(name).momentum = self.momentum  # type: ignore[assignment]
        return model


def resolve(strategy: FTConfig | str | Iterable[FTConfig | str]) -> tuple[FTConfig, ...]:
    """Resolve a config, a registered name, or a list of either, to a tuple of configs.

    Raises:
        OptionError: for anything else, an empty list, or an unknown name.
    """
    several = isinstance(strategy, Iterable) and not isinstance(strategy, str)
    items = tuple(strategy) if several else (strategy,)  # type: ignore[arg-type]
    configs = tuple(config_class(item)() if isinstance(item, str) else item for item in items)
    wrong = [item for item in configs if not isinstance(item, FTConfig)]
    if wrong or not configs:
        hint = f" Call it: {wrong[0].__name__}()." if wrong and isinstance(wrong[0], type) else ""
        raise OptionError(
            f"strategy={strategy!r} is not a strategy.{hint} Pass a config such as L2SPConfig(), a registered name "
            f"({', '.join(strategies())}), or a list of them."
        )
    return configs  # type: ignore[return-value]


def sources_of(configs: Iterable[FTConfig]) -> tuple[str, ...]:
    """Names of the source models of a run's strategies; empty if it trains a single model."""
    return next((found for config in configs if (found := config.sources())), ())


def shared_option(configs: Iterable[FTConfig], name: str) -> Any:
    """Value of an option shared by all strategies of a run; explicit values override the default.

    Raises:
        OptionError: if two strategies set different values; both are named.
    """
    return explicit_option(configs, name, next(f.default for f in options(FTConfig) if f.name == name))


def explicit_option(configs: Iterable[FTConfig], name: str, otherwise: Any = None) -> Any:
    """Value of a shared option if a strategy sets one that differs from its own default.

    Raises:
        OptionError: if two strategies set different values; both are named.
    """
    owners = {getattr(c, name): c.ft_type for c in configs if getattr(c, name) != getattr(type(c), name)}
    if len(owners) > 1:
        (a, one), (b, other) = list(owners.items())[:2]
        raise OptionError(f"{one}.{name}={a!r} and {other}.{name}={b!r} conflict: set both to the same value.")
    return next(iter(owners), otherwise)


def sharing(configs: Iterable[FTConfig]) -> tuple[FTConfig, ...]:
    """The strategies of a run, each with the common options that any of them sets.

    Raises:
        OptionError: if two strategies set different values; both are named.
    """
    configs = tuple(configs)
    found = {field.name: explicit_option(configs, field.name) for field in options(FTConfig)}
    common: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    return tuple(dataclasses.replace(config, **common) for config in configs)


def check_composed(configs: Iterable[FTConfig]) -> None:
    """Reject strategies that one of them cannot be composed with.

    Raises:
        OptionError: naming both.
    """
    configs = tuple(configs)
    names = [config.ft_type for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"{twice} is given twice: use one config with all its options.")
    for config in configs:
        config.check_beside(tuple(other for other in configs if other is not config))


def check_examples(configs: Iterable[FTConfig], model: nn.Module) -> None:
    """Reject conflicts between the plans of strategies before anything is measured, as far as they are known then.

    Raises:
        OptionError: naming the strategies.
    """
    configs = sharing(configs)
    if len(configs) > 1:
        with_common_options(configs, [_owned(config.example_plan(model), config) for config in configs], model)


def build_plan(configs: Iterable[FTConfig], model: nn.Module, states: Mapping[str, State]) -> Plan:
    """Compose the plans of all strategies, with the options that they share."""
    configs = sharing(configs)
    check_states(configs, model, states)
    plans = [_owned(config.plan(model, states.get(config.ft_type, State())), config) for config in configs]
    plan = with_common_options(configs, plans, model)
    for config in configs:
        if config.needs_batch_statistics() and plan.stages[-1].norm_mode == "eval":
            logger.warning_once(
                f"{config.ft_type}: BatchNorm keeps its statistics, so what is changed there has no effect. Set "
                f"norm_mode='auto' in {plan.owner or config.ft_type}."
            )
    return plan


def _owned(plan: Plan, config: FTConfig) -> Plan:
    return dataclasses.replace(plan, owner=config.ft_type)


def check_states(configs: Iterable[FTConfig], model: nn.Module, states: Mapping[str, State]) -> None:
    """Reject states that their strategies cannot use.

    Raises:
        OptionError: naming the strategy, the entry and the fix.
    """
    for config in configs:
        try:
            config.check_state(model, states.get(config.ft_type, State()))
        except OptionError as error:
            raise OptionError(
                f"the measured state of {config.ft_type} is damaged, or not from this model: {error} Measure again: "
                "train without states=..., or resume from another checkpoint."
            ) from error


def with_common_options(configs: Iterable[FTConfig], plans: Iterable[Plan], model: nn.Module) -> Plan:
    """Compose plans, with the momentum of BatchNorm and, if one was chosen, the mode of normalisation layers."""
    configs, plans = tuple(configs), tuple(plans)
    _check_renamed(configs, plans)
    plan = compose([momentum_plan(shared_option(configs, "batch_norm_momentum"), model), *plans])
    mode = explicit_option(configs, "norm_mode") if any(one.stages for one in plans) else _norm_mode(configs)
    if mode is None:
        return plan
    return dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, norm_mode=mode) for s in plan.stages))


def owner_of_stages(configs: Iterable[FTConfig], model: nn.Module) -> str | None:
    """The strategy that decides which parameters train when, if one does, and the mode of the normalisation layers."""
    configs = tuple(configs)
    if len(configs) == 1:
        return configs[0].ft_type
    for config in configs:
        with suppress(OptionError):  # a model that it cannot train is refused elsewhere
            if config.example_plan(model).stages:
                return config.ft_type
    return None


def _norm_mode(configs: Iterable[FTConfig], model: nn.Module | None = None) -> NormMode | None:
    """The mode that is set, or else the one that a strategy prefers, unless another one needs batch statistics.

    Args:
        model: the model to be trained, if the preference of a strategy gives way to the stages of another.
    """
    configs = tuple(configs)
    if mode := explicit_option(configs, "norm_mode"):
        return mode
    preferring = [config for config in configs if config.norm_mode != FTConfig.norm_mode]
    if not preferring or any(config.needs_batch_statistics() for config in configs):
        return None
    owner = None if model is None else owner_of_stages(configs, model)
    return next((config.norm_mode for config in preferring if owner in (None, config.ft_type)), None)


def momentum_plan(momentum: float | str, model: nn.Module) -> Plan:
    """Plan that sets the momentum of BatchNorm layers according to ``batch_norm_momentum``."""
    if momentum == "keep":
        return Plan()
    if momentum == "auto":
        names = tuple(tensorflow_momentum(model))
        if names:
            old = sorted({norm.momentum for name, norm in batch_norms(model) if name in names and norm.momentum})
            logger.warning_once(
                f"BatchNorm momentum {old} of {len(names)} layers is TensorFlow's decay: the running statistics would "
                "track only the last batch. Set to 0.1 (batch_norm_momentum='keep' leaves it unchanged)."
            )
        return Plan(surgery=(SetBatchNormMomentum(names, 0.1),)) if names else Plan()
    names = tuple(name for name, _ in batch_norms(model))
    return Plan(surgery=(SetBatchNormMomentum(names, float(momentum)),)) if names else Plan()


# Early in a run, the gradient's norm is far above the Trainer's limit of 1: with SGD, unlike with Adam, clipping then
# shrinks the steps.
UNDER_SGD = {
    "optim_args": Recommended("momentum=0.9"),
    "max_grad_norm": Recommended(0.0, why="under SGD, clipping the norm to 1 shrinks most steps"),
}

# If pretrained layers train without batch statistics, because there is no BatchNorm or it keeps its statistics, but not
# under SGD. docs/rates.md has the scores with and without it.
WITHOUT_BATCH_STATISTICS = {
    "warmup_steps": Recommended(
        0.1, why="without batch statistics, the first steps of Adam destroy pretrained features"
    )
}


def chooses_rate(config: FTConfig) -> bool:
    """Whether a strategy chooses its learning rate itself if the user sets none; no recommended rate is used then."""
    return "learning_rate" in config.recommended and config.recommended["learning_rate"].value == CHOSEN


def finds_rate(config: FTConfig) -> bool:
    """Whether a strategy chooses its learning rate itself, or fits it to the head, if the user sets none."""
    return "learning_rate" in config.recommended and config.recommended["learning_rate"].found


def recommended_arguments(
    configs: Iterable[FTConfig], optim: str | None = None, model: nn.Module | None = None
) -> dict[str, Recommended]:
    """Merge the recommended training arguments; if two strategies differ, the first takes precedence.

    Args:
        optim: the optimizer in use; by default the recommended one, or else AdamW. The recommended learning rate, and
            whatever else the optimizer needs, are those for this optimizer.
        model: the model to be trained, whose family and normalisation affect the rate and the warm-up; by default, one
            with BatchNorm.
    """
    merged: dict[str, Recommended] = {}
    configs = tuple(configs)
    for config in sorted(configs, key=lambda config: not chooses_rate(config)):
        for name, wanted in config.recommended.items():
            merged.setdefault(name, wanted)
    own = merged["optim"].value if "optim" in merged else ADAM
    if optim is not None and optim != own:
        merged.pop("optim", None)
        merged.pop("optim_args", None)  # these belong to the recommended optimizer
        merged.pop("max_grad_norm", None)
    optim = optim or own
    rate = merged.get("learning_rate")
    if isinstance(rate, LearningRate):
        batch_norm = model is None or bool(batch_norms(model))
        kept = batch_norm and rate.kept is not None and _norm_mode(configs, model) == "eval"
        if optim != SGD and rate.warms_up(batch_norm, kept):
            merged = WITHOUT_BATCH_STATISTICS | merged
        family = getattr(getattr(model, "config", None), "model_type", "")
        merged["learning_rate"] = rate.under(optim, batch_norm, kept, family)
    if rate is not None and rate.found:
        del merged["learning_rate"]
    return merged | {name: wanted for name, wanted in UNDER_SGD.items() if optim == SGD and name not in merged}


def compose(plans: Iterable[Plan]) -> Plan:
    """Compose plans: terms add up, surgery and finalise run in order, at most one plan owns stages, one averages.

    Raises:
        OptionError: if two plans own stages, average the weights, or set the learning rate, the rates or initial
            weights of the same modules or the rates of tensors (both are named), two terms share a name, two streams
            of the same name differ, or stage durations do not sum to 1.
    """
    plans = tuple(plans)
    owner = _only(plans, "stages", "decide which parameters train when")
    averaging = _only(plans, "average", "average the weights")
    rated = _only(plans, "tensor_rates", "set the learning rate of each tensor")
    terms = tuple(term for plan in plans for term in plan.terms)
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    stages = _checked(owner.stages if owner else (Stage("train"),))
    _check_set_once(plans)
    if twice:
        raise OptionError(f"two strategies add a term named {twice[0]!r}; use one of them.")
    return Plan(
        # Equal surgery requested by several strategies is done once.
        surgery=tuple(dict.fromkeys(s for plan in plans for s in plan.surgery)),
        terms=terms,
        stages=tuple(dataclasses.replace(stage, rates=_rates(stage, owner, plans)) for stage in stages),
        streams=_streams(plans),
        select=tuple(s for plan in plans for s in plan.select),
        finalise=tuple(s for plan in plans for s in plan.finalise),
        gradients=tuple(change for plan in plans for change in plan.gradients),
        tensor_rates=rated.tensor_rates if rated else None,
        learning_rate=_learning_rate(plans),
        average=averaging.average if averaging else None,
        draws=any(plan.draws for plan in plans),
        owner=owner.owner if owner else None,
    )


def _only(plans: Iterable[Plan], name: str, doing: str) -> Plan | None:
    """The plan that sets this attribute, if any does."""
    setting = [plan for plan in plans if getattr(plan, name)]
    if len(setting) > 1:
        raise OptionError(f"{' and '.join(str(plan.owner) for plan in setting)} both {doing}; use one of them.")
    return setting[0] if setting else None


def _checked(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    shares = [stage.duration for stage in stages]
    if abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise OptionError(f"stage durations {shares} must be positive and sum to 1.")
    return stages


def _check_renamed(configs: Iterable[FTConfig], plans: Iterable[Plan]) -> None:
    """Reject learning rates and gradients of layers that another strategy's adapters rename: they would be lost."""
    adapting = [config.ft_type for config in configs if config.adds_adapters()]
    for plan in plans if adapting else ():
        names = plan.rates or plan.tensor_rates or any(change.on != EVERYTHING for change in plan.gradients)
        if names and plan.owner not in adapting:
            what = "learning rates" if plan.rates or plan.tensor_rates else "gradients"
            raise OptionError(
                f"{plan.owner} sets {what} of layers to which {adapting[0]} adds adapters: use one of them."
            )


def _check_set_once(plans: Iterable[Plan]) -> None:
    """Reject different surgery of two plans that sets the same weights: the second would undo the first."""
    surgery = [(part, plan.owner) for plan in plans for part in plan.surgery]
    for (one, owner), (other, second) in itertools.combinations(surgery, 2):
        both = sorted(sets_weights(one) & sets_weights(other))
        if both and one != other and owner != second:
            raise OptionError(
                f"{owner} and {second} both set the initial weights of {', '.join(both)}: use one of them. An option "
                "zero_head=False leaves the head's to the other."
            )


def _rates(stage: Stage, owner: Plan | None, plans: Iterable[Plan]) -> tuple[Rate, ...]:
    """The learning rates of a stage: its own and those that plans set in every stage."""
    found = {rate: owner.owner if owner else None for rate in stage.rates}
    for plan in plans:
        for rate in plan.rates:
            for other, name in found.items():
                if other != rate and name != plan.owner and (both := _overlap(rate, other)):
                    raise OptionError(
                        f"{name} and {plan.owner} both set the learning rate of {both!r}: use one of them, or, if it "
                        "is the head, set head_lr=None in one."
                    )
            found.setdefault(rate, plan.owner)
    return tuple(found)


def _overlap(one: Rate, other: Rate) -> str:
    """A module or parameter that two rates apply to; empty if there is none."""
    pairs = ((a, b) for a in one.names for b in other.names)
    return next((a if covers(b, a) else b for a, b in pairs if covers(a, b) or covers(b, a)), "")


def _streams(plans: Iterable[Plan]) -> tuple[Stream, ...]:
    streams: list[Stream] = []
    for stream in (stream for plan in plans for stream in plan.streams):
        if stream in streams:
            continue
        if any(stream.name == other.name for other in streams):
            raise OptionError(
                f"two strategies request the stream {stream.name!r} with different settings: {streams}, {stream}."
            )
        streams.append(stream)
    return tuple(streams)


def _learning_rate(plans: Iterable[Plan]) -> float | None:
    rates = {plan.learning_rate: plan.owner for plan in plans if plan.learning_rate is not None}
    if len(rates) > 1:
        names = " and ".join(f"{owner} ({rate:g})" for rate, owner in rates.items())
        raise OptionError(f"{names} each choose a learning rate: use one of them, or set learning_rate.")
    return next(iter(rates), None)
