"""The contenders of a comparison: strategies with their search space, model and data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_ft.comparison.settings import Settings
from hf_ft.comparison.task import Bench
from hf_ft.core.compose import resolve
from hf_ft.core.config import BASELINE, FTConfig, strategies
from hf_ft.core.options import options
from hf_ft.core.search_space import Choice, LogRange, Space, edges, spread
from hf_ft.errors import AnatomyError, OptionError

RATE, MOMENTUM = "learning_rate", "batch_norm_momentum"
SEARCH_SHARE = 0.5  # share of the tuning budget for a strategy's own search; the rest is for learning rates
Strategy = str | FTConfig | Sequence[FTConfig | str]
Strategies = str | Iterable[Strategy] | Mapping[str, Strategy]


@dataclass(frozen=True)
class Entrant:
    """A contender before its trainings.

    Attributes:
        refusal: why it cannot run, if known in advance.
    """

    name: str
    configs: tuple[FTConfig, ...]
    space: Space
    bench: Bench
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

    def settings(self, count: int, first_rate: float, seed: int) -> list[dict[str, Any]]:
        """The settings of all trials: the defaults at ``first_rate``, then points spread over the space.

        All contenders try the same learning rates, as far as their numbers of trials allow.
        """
        first = {RATE: first_rate, **{name: self._default(name) for name in self.space if name != RATE}}
        return [first, *spread(self.space, count - 1, seed)]

    def with_settings(self, values: Mapping[str, Any]) -> tuple[FTConfig, ...]:
        """The strategies with their tuned options; the learning rate is passed to the trainer."""
        made = []
        for config in self.configs:
            own = {name.partition(".")[2]: v for name, v in values.items() if name.startswith(f"{config.ft_type}.")}
            made.append(dataclasses.replace(config, **own))
        return tuple(made)

    def edges(self, values: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """Chosen values at the edge of their range, or of the values tried: better values may lie beyond."""
        found = list(edges(self.space, values))
        for name, part in self.space.items():
            known = {other[name] for other in tried if other.get(name) is not None}
            extreme = len(known) > 2 and values.get(name) in (min(known), max(known))
            if isinstance(part, LogRange) and extreme and name not in found:
                found.append(name)
        return tuple(found)

    def described_space(self) -> dict[str, str]:
        """The search space in readable form."""
        shown = {}
        for name, part in self.space.items():
            lot = isinstance(part, LogRange)
            shown[name] = f"{part.low:g} to {part.high:g}" if lot else ", ".join(map(str, part.values))  # type: ignore[union-attr]
        return shown

    def key(self, what: str, values: Mapping[str, Any], seed: int) -> str:
        """The key of a training, unique to the contender's options."""
        content = [[config.identity() for config in self.configs], self.bench.fingerprint, dict(values), seed]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.name} {what} {digest}"

    def file_name(self, values: Mapping[str, Any] | None = None) -> str:
        """A file name that is unique to the contender's options and tuned values."""
        plain = re.sub(r"[^\w+.]+", "_", self.name).lstrip(".")
        return f"{plain}-{self.key('', values or {}, 0).rpartition(' ')[2]}"

    def _default(self, name: str) -> Any:
        ft_type, _, option = name.partition(".")
        return next(getattr(config, option) for config in self.configs if config.ft_type == ft_type)


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
            raise OptionError(f"strategies: {name} occurs twice: name it once.")
        found[name] = configs
    return found


def entrant(
    name: str,
    configs: Iterable[FTConfig],
    bench: Bench,
    settings: Settings,
    *,
    optim: str,
    metric: str,
    epochs: float,
    model: nn.Module,
    untuned: Collection[str] = (),
) -> Entrant:
    """Build a contender: limit its own search to its share of the budget, set up its space and the common options.

    A contender that cannot run on the model gets a refusal instead of raising, so that the others can continue.

    Args:
        optim: the optimizer; it determines the range of learning rates.
        metric: the metric of the strategy's own search.
        epochs: number of epochs of each training.
        model: a model of the kind to be trained.
        untuned: options that are not tuned, as ``strategy.option``; options set to non-default values are never tuned.
    """
    made: list[FTConfig] = []
    notes: list[str] = []
    refusal = ""
    configs = tuple(configs)
    free_momentum = all(_at_default(config, MOMENTUM) for config in configs) and settings.batch_norm_momentum > 0
    space: dict[str, LogRange | Choice] = {RATE: settings.rates(optim)}
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
        # With several source models, an epoch costs as much as one epoch for each of them.
        room = SEARCH_SHARE * settings.trials * epochs / max(1, len(config.sources()))
        try:
            changed = changed.within(room, model) if settings.trials and changed.measures() else changed
        except (OptionError, AnatomyError) as error:
            refusal = str(error)
        made.append(changed)
        space |= {
            f"{config.ft_type}.{option}": part
            for option, part in type(config).tuned.items()
            if _at_default(config, option) and f"{config.ft_type}.{option}" not in untuned
        }
    return Entrant(name, tuple(made), space, bench, tuple(notes), refusal)


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
