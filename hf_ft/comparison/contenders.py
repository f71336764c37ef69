"""The contenders of a comparison: strategies with their search space, model and data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_ft.comparison.settings import Settings
from hf_ft.comparison.task import Bench
from hf_ft.core.compose import (
    chooses_rate,
    owner_of_stages,
    recommended_arguments,
    resolve,
    shared_option,
)
from hf_ft.core.config import BASELINE, FTConfig, config_class, strategies
from hf_ft.core.head_rate import HEAD_LR, HeadFit
from hf_ft.core.options import options
from hf_ft.core.recommended import ADAM, FITTED, SGD
from hf_ft.core.search_space import RATE, Choice, Declared, FittedRate, LogRange, Space, edges, spread, within
from hf_ft.errors import AnatomyError, OptionError
from hf_ft.models.norms import batch_norms

OPTIM, MOMENTUM = "optim", "batch_norm_momentum"
UNKNOWN_HEAD = (1e-3, 1e-2)  # the learning rate of a head that cannot be found: with Adam, with SGD
SEARCH_SHARE = 0.5  # share of the tuning budget for a strategy's own search; the rest is for learning rates
Strategy = str | FTConfig | Sequence[FTConfig | str]
Strategies = str | Iterable[Strategy] | Mapping[str, Strategy]


@dataclass(frozen=True)
class Entrant:
    """A contender before its training runs.

    Attributes:
        spaces: the search space for each optimizer; the one that its strategies recommend comes first.
        first: the settings of its first trial, which are its defaults.
        head_rates: the fitted learning rate of the head for each optimizer; empty if it is not needed, or if the
            model's head is unknown.
        refusal: why it cannot run, if this is known in advance.
    """

    name: str
    configs: tuple[FTConfig, ...]
    spaces: Mapping[str, Space]
    first: Mapping[str, Any]
    bench: Bench
    head_rates: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def looks(self) -> bool:
        """Whether its strategies measure the data before training."""
        return any(config.measures() for config in self.configs)

    @property
    def keeps_head(self) -> bool:
        """Whether it needs the pretrained head in addition to the new one."""
        return any(config.needs().source_head for config in self.configs)

    def on_fold(self, number: int) -> Entrant:
        """The same with the data of a fold; the first follows the last."""
        folds = self.bench.folds
        return self if len(folds) == 1 else dataclasses.replace(self, bench=folds[number % len(folds)])

    def settings(self, count: int, seed: int) -> list[dict[str, Any]]:
        """The settings of all trials: the defaults, then points spread over the spaces of each optimizer in turn.

        All contenders try the same shares of their ranges of learning rates, as far as their numbers of trials allow.
        """
        if not any(self.spaces.values()):  # nothing is tuned
            return [dict(self.first)]
        order = list(self.spaces)
        points = {optim: spread(space, -(-count // len(order)), seed) for optim, space in self.spaces.items()}
        found = [dict(self.first)]
        for number in range(count - 1):
            optim = order[(number + 1) % len(order)]  # the first trial used the first
            found.append(self._named(optim) | points[optim][number // len(order)])
        return found

    def optim(self, values: Mapping[str, Any]) -> str:
        """The optimizer of a training run."""
        return str(values.get(OPTIM, next(iter(self.spaces))))

    def _named(self, optim: str) -> dict[str, Any]:
        return {OPTIM: optim} if len(self.spaces) > 1 else {}

    def with_settings(self, values: Mapping[str, Any]) -> tuple[FTConfig, ...]:
        """The strategies with their tuned options; optimizer and learning rate are passed to the trainer."""
        made = []
        tuned = (value for name, value in values.items() if name.endswith(f".{HEAD_LR}"))
        rate = next(tuned, self.head_rates.get(self.optim(values)))  # the same for all strategies that fit it
        for config in self.configs:
            own = {name.partition(".")[2]: v for name, v in values.items() if name.startswith(f"{config.ft_type}.")}
            chosen = dataclasses.replace(config, **own)
            made.append(chosen if rate is None else chosen.with_head_rate(rate))
        return tuple(made)

    def edges(self, values: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """Chosen values at the edge of their range, or of the values tried: better values may lie beyond."""
        space = self.spaces[self.optim(values)]
        found = list(edges(space, values))
        others = [within(space, v) for v in tried if self.optim(v) == self.optim(values)]
        for name, part in space.items():
            known = {v[name] for v in others if v.get(name) is not None}
            extreme = len(known) > 2 and within(space, values).get(name) in (min(known), max(known))
            if isinstance(part, LogRange) and extreme and name not in found:
                found.append(name)
        return tuple(found)

    def described_space(self) -> dict[str, str]:
        """The search space in readable form."""
        shown: dict[str, str] = {OPTIM: ", ".join(self.spaces)} if len(self.spaces) > 1 else {}
        for name in next(iter(self.spaces.values())):
            texts = {optim: _described(space[name]) for optim, space in self.spaces.items()}
            same = len(set(texts.values())) == 1
            text = next(iter(texts.values()))
            shown[name] = text if same else "; ".join(f"{text} ({optim})" for optim, text in texts.items())
        return shown

    def key(self, what: str, values: Mapping[str, Any], seed: int) -> str:
        """The key of a training run, unique to the contender's options."""
        content = [[config.identity() for config in self.configs], self.bench.fingerprint, dict(values), seed]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.name} {what} {digest}"

    def file_name(self, values: Mapping[str, Any] | None = None) -> str:
        """A file name that is unique to the contender's options and tuned values."""
        plain = re.sub(r"[^\w+.]+", "_", self.name).lstrip(".")
        return f"{plain}-{self.key('', values or {}, 0).rpartition(' ')[2]}"


def _described(part: LogRange | Choice) -> str:
    if isinstance(part, LogRange):
        return f"{part.low:g} to {part.high:g}"
    factors = [part.rate_factor(value) for value in part.values]
    said = [f" (lr x {factor:g})" if factor != 1 else "" for factor in factors]
    return ", ".join(f"{value}{more}" for value, more in zip(part.values, said, strict=True))


def chosen_strategies(wanted: Strategies) -> dict[str, tuple[FTConfig, ...]]:
    """Strategies by name, full fine-tuning first.

    Args:
        wanted: ``"all"``; names joined by commas (``"lp_ft,lp_ft+l2_sp"``: ``+`` composes); a list of names, configs
            and lists of these; or a mapping from custom names to these.

    Raises:
        OptionError: if a name is unknown or occurs twice.
    """
    if isinstance(wanted, str):
        wanted = list(strategies()) if wanted == "all" else [name.strip() for name in wanted.split(",")]
    found: dict[str, tuple[FTConfig, ...]] = {}
    if isinstance(wanted, Mapping):
        named = {name: resolve(item.split("+") if isinstance(item, str) else item) for name, item in wanted.items()}
        return {BASELINE: named.pop(BASELINE, resolve(BASELINE)), **named}
    for item in (BASELINE, *wanted):
        configs = resolve(item.split("+") if isinstance(item, str) else item)
        name = "+".join(config.ft_type for config in configs)
        if name in found and name != BASELINE:
            raise OptionError(f"strategies: {name} occurs twice: list it once.")
        found[name] = configs
    return found


def entrant(
    name: str,
    configs: Iterable[FTConfig],
    bench: Bench,
    settings: Settings,
    *,
    optims: Sequence[str],
    metric: str,
    epochs: float,
    model: nn.Module,
    head: Callable[[Bench, str | None], HeadFit | None] = lambda bench, name: None,
    untuned: Collection[str] = (),
) -> Entrant:
    """Build a contender: limit its own search to its share of the budget, set up its space and the common options.

    A contender that cannot run on the model gets a refusal instead of raising, so that the others can continue.

    Args:
        optims: the optimizers to try; each has its own learning rates.
        metric: the metric of the strategy's own search.
        epochs: number of epochs of each training run.
        model: a model of the kind to be trained.
        head: gives what determines the learning rate of the head, from the bench and the head's name if it was set;
            None if the head is unknown.
        untuned: options that are not tuned, as ``strategy.option``; options set to non-default values are never tuned.
    """
    configs = tuple(configs)
    made, notes, refusal = _prepared(configs, bench, settings, metric, epochs, model)
    tuned = _tuned(configs, untuned, model)
    if not batch_norms(model):  # it would change nothing
        tuned = {option: part for option, part in tuned.items() if not option.endswith(".norm_mode")}
    recommended = recommended_arguments(configs)
    own = recommended["optim"].value if "optim" in recommended else ADAM
    order = sorted(optims, key=lambda optim: optim != own)  # its own first
    if any(map(chooses_rate, configs)):
        return _untuned(name, made, bench, order[0], tuned, notes, refusal)
    rates = {optim: _recommended_rate(configs, optim, model) for optim in order}
    fits = any(isinstance(part, FittedRate) for part in tuned.values()) or None in rates.values()
    fits |= any(getattr(config, "head_lr", None) == "auto" for config in configs)
    fit = head(bench, shared_option(configs, "head")) if fits and not refusal else None
    head_rates = {} if fit is None else {optim: fit.rate(optim) for optim in order}
    if head_rates:
        shown = ", ".join(f"{rate:g} ({optim})" for optim, rate in head_rates.items())
        notes.append(f"{name}: the learning rate that fits the head's features is {shown}")
    spaces, firsts = {}, []
    for optim in order:
        rate = rates[optim] or head_rates.get(optim, UNKNOWN_HEAD[optim == SGD])
        parts = {
            option: _at_any_rate(part) if settings.learning_rates else _at_its_rate(option, part, configs, optim, model)
            for option, part in tuned.items()
        }
        spaces[optim] = _space(settings.rates(rate), parts, head_rates.get(optim))
        firsts.append(_first(spaces[optim], rate, configs, head_rates.get(optim)))
    first = ({OPTIM: order[0]} if len(order) > 1 else {}) | firsts[0]
    return Entrant(name, tuple(made), spaces, first, bench, head_rates, tuple(notes), refusal)


def _tuned(
    configs: Iterable[FTConfig], untuned: Collection[str], model: nn.Module
) -> dict[str, LogRange | Choice | FittedRate]:
    """The options to tune, as ``strategy.option``; composed strategies share the head's rate and common options.

    The mode of BatchNorm is not tuned if one of them needs batch statistics. Otherwise it is that of a strategy with a
    default of its own, if there is one: "auto" for another strategy would leave the choice to that default. If
    another strategy has stages, that default has no effect.
    """
    configs = sorted(configs, key=lambda config: not _prefers_mode(config))
    owner = owner_of_stages(configs, model)
    batch_statistics = any(config.needs_batch_statistics() for config in configs)
    common = {field.name for field in options(FTConfig)} | {HEAD_LR}
    found: dict[str, LogRange | Choice | FittedRate] = {}
    for config in configs:
        for option, part in type(config).tuned.items():
            name = f"{config.ft_type}.{option}"
            shared = option in common and any(other.endswith(f".{option}") for other in found)
            without_effect = _prefers_mode(config) and owner not in (None, config.ft_type)
            if option == "norm_mode" and (batch_statistics or without_effect):
                continue
            if _at_default(config, option) and name not in untuned and not shared:
                found[name] = part
    return found


def _prefers_mode(config: FTConfig) -> bool:
    """Whether the strategy has a default of its own for ``norm_mode``."""
    return type(config).norm_mode != FTConfig.norm_mode


def _untuned(
    name: str, made: Sequence[FTConfig], bench: Bench, optim: str, tuned: Declared, notes: Sequence[str], refusal: str
) -> Entrant:
    """A contender that chooses its learning rate itself, once, with its first optimizer."""
    space = {option: part for option, part in tuned.items() if not isinstance(part, FittedRate)}
    first = {option: _default(made, option) for option in space}
    return Entrant(name, tuple(made), {optim: space}, first, bench, {}, tuple(notes), refusal)


def _at_its_rate(
    name: str, part: LogRange | Choice | FittedRate, configs: Sequence[FTConfig], optim: str, model: nn.Module
) -> LogRange | Choice | FittedRate:
    """With the rate that is recommended for each of its values, as a factor of that for the default."""
    usual = _recommended_rate(configs, optim, model)
    if not isinstance(part, Choice) or part.rates or usual is None:
        return part
    ft_type, _, option = name.partition(".")
    factors = []
    for value in part.values:
        made = [dataclasses.replace(c, **{option: value}) if c.ft_type == ft_type else c for c in configs]
        factors.append(float(f"{(_recommended_rate(made, optim, model) or usual) / usual:.3g}"))
    return dataclasses.replace(part, rates=tuple(factors))


def _at_any_rate(part: LogRange | Choice | FittedRate) -> LogRange | Choice | FittedRate:
    """Without factors of the learning rate: the user's range applies to all trials."""
    return dataclasses.replace(part, rates=()) if isinstance(part, Choice) else part


def _space(rates: LogRange, tuned: Declared, head_rate: float | None) -> dict[str, LogRange | Choice]:
    """The space for one optimizer; without a fitted rate, the head's rate is not tuned."""
    space: dict[str, LogRange | Choice] = {RATE: rates}
    for name, part in tuned.items():
        if not isinstance(part, FittedRate):
            space[name] = part
        elif head_rate is not None:
            space[name] = part.around(head_rate)
    return space


def _first(space: Space, rate: float, configs: Sequence[FTConfig], head_rate: float | None) -> dict[str, Any]:
    """The defaults: the recommended rate, within the user's range, and the options as they are."""
    rates = space[RATE]
    assert isinstance(rates, LogRange)
    values: dict[str, Any] = {RATE: min(max(rate, rates.low), rates.high)}
    for name in space:
        if name != RATE:
            default = _default(configs, name)
            values[name] = head_rate if default == "auto" and isinstance(space[name], LogRange) else default
    return values


def _prepared(
    configs: tuple[FTConfig, ...], bench: Bench, settings: Settings, metric: str, epochs: float, model: nn.Module
) -> tuple[list[FTConfig], list[str], str]:
    """The strategies with the common options, notes for the reader, and why they cannot run, if so."""
    made: list[FTConfig] = []
    notes: list[str] = []
    refusal = ""
    free_momentum = all(_at_default(config, MOMENTUM) for config in configs) and settings.batch_norm_momentum > 0
    for config in configs:
        known = {field.name for field in options(type(config))}
        common: dict[str, Any] = {"metric": metric, "storage": "memory"}
        common |= {MOMENTUM: settings.batch_norm_momentum} if free_momentum else {}
        own = {n: v for n, v in common.items() if n in known and _at_default(config, n)}
        try:
            config = _fitting(config, bench, model, notes)
        except OptionError as error:
            refusal = str(error)
        changed = dataclasses.replace(config, **own)
        # Shorten the measurement to its share of the budget, but do not skip it: its result is part of the strategy.
        # With several source models, an epoch costs as much as one epoch of each of them.
        room = SEARCH_SHARE * settings.trials * epochs / max(1, len(config.sources()))
        try:
            changed = changed.within(room, model) if settings.trials and changed.measures() else changed
        except (OptionError, AnatomyError) as error:
            refusal = str(error)
        made.append(changed)
    return made, notes, refusal


def _recommended_rate(configs: Sequence[FTConfig], optim: str, model: nn.Module) -> float | None:
    """The recommended learning rate; None for the head's, and the baseline's if nothing is recommended."""
    if any(RATE in config.recommended and config.recommended[RATE].value == FITTED for config in configs):
        return None
    found = recommended_arguments([*configs, config_class(BASELINE)()], optim, model)
    return float(found[RATE].value)


def _default(configs: Sequence[FTConfig], name: str) -> Any:
    ft_type, _, option = name.partition(".")
    return next(getattr(config, option) for config in configs if config.ft_type == ft_type)


def _fitting(config: FTConfig, bench: Bench, model: nn.Module, notes: list[str]) -> FTConfig:
    """The form of a strategy that fits the data and the model; deviations from the requested form are noted.

    Raises:
        OptionError: if no form fits this model.
    """
    name, free = config.ft_type, config.source_free()
    if bench.source is None and free is not None and config.needs().source_data == "required":
        config = free
        notes.append(f"{name} runs in its source-free form: there are no source data")
    fitting = config.adapted(model)
    if fitting is None:
        raise OptionError(f"{name} cannot run on this model: leave it out.")
    before = config.to_dict()
    changed = ", ".join(f"{key}={value}" for key, value in fitting.to_dict().items() if value != before[key])
    if changed:
        notes.append(f"{name} runs with {changed} to fit this model")
    return fitting


def _at_default(config: FTConfig, name: str) -> bool:
    return getattr(config, name) == next(f.default for f in options(type(config)) if f.name == name)
