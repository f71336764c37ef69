"""Who takes part: a strategy with what is tuned of it, and the model and data that it trains with."""

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
SEARCH_SHARE = 0.5  # of the tuning budget, for a strategy's own search; the rest is for the rates
Strategy = str | FTConfig | Sequence[FTConfig | str]
Strategies = str | Iterable[Strategy] | Mapping[str, Strategy]


@dataclass(frozen=True)
class Entrant:
    """A contender before it ran.

    Attributes:
        refusal: why it cannot run, where that is known beforehand.
    """

    name: str
    configs: tuple[FTConfig, ...]
    space: Space
    bench: Bench
    notes: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def looks(self) -> bool:
        """Whether its strategies look at the data first."""
        return any(config.measures() for config in self.configs)

    @property
    def keeps_head(self) -> bool:
        """Whether it needs the pretrained head beside the new one."""
        return any(config.needs().source_head for config in self.configs)

    def settings(self, count: int, first_rate: float, seed: int) -> list[dict[str, Any]]:
        """What to try: first the defaults at ``first_rate``, then points spread over the space.

        The learning rates are the same for all contenders, as far as they are as many.
        """
        first = {RATE: first_rate, **{name: self._default(name) for name in self.space if name != RATE}}
        return [first, *spread(self.space, count - 1, seed)]

    def with_settings(self, values: Mapping[str, Any]) -> tuple[FTConfig, ...]:
        """The strategies with tuned options; the learning rate is the trainer's."""
        made = []
        for config in self.configs:
            own = {name.partition(".")[2]: v for name, v in values.items() if name.startswith(f"{config.ft_type}.")}
            made.append(dataclasses.replace(config, **own))
        return tuple(made)

    def edges(self, values: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """The chosen values on the edge of their range, or of what was tried of it: better ones may lie beyond."""
        found = list(edges(self.space, values))
        for name, part in self.space.items():
            known = {other[name] for other in tried if other.get(name) is not None}
            extreme = len(known) > 2 and values.get(name) in (min(known), max(known))
            if isinstance(part, LogRange) and extreme and name not in found:
                found.append(name)
        return tuple(found)

    def described_space(self) -> dict[str, str]:
        """The space for people."""
        shown = {}
        for name, part in self.space.items():
            lot = isinstance(part, LogRange)
            shown[name] = f"{part.low:g} to {part.high:g}" if lot else ", ".join(map(str, part.values))  # type: ignore[union-attr]
        return shown

    def key(self, what: str, values: Mapping[str, Any], seed: int) -> str:
        """A name of one training, that tells it from one of the same contender with other options."""
        content = [[config.to_dict() for config in self.configs], self.bench.fingerprint, dict(values), seed]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.name} {what} {digest}"

    def file_name(self, values: Mapping[str, Any] | None = None) -> str:
        """A name for files that tells it from the same contender with other options, or other tuned values."""
        plain = re.sub(r"[^\w+.]+", "_", self.name).lstrip(".")
        return f"{plain}-{self.key('', values or {}, 0).rpartition(' ')[2]}"

    def _default(self, name: str) -> Any:
        ft_type, _, option = name.partition(".")
        return next(getattr(config, option) for config in self.configs if config.ft_type == ft_type)


def chosen_strategies(wanted: Strategies) -> dict[str, tuple[FTConfig, ...]]:
    """Strategies by name, full fine-tuning first.

    Args:
        wanted: ``"all"``; names joined by commas (``"lp_ft,lp_ft+l2_sp"``: ``+`` composes); a list of names, configs
            and lists of these; or a mapping from names of your own to these.

    Raises:
        OptionError: an unknown name, or one that occurs twice.
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
    """A contender: its own search cut to its share of the budget, its space declared, the common options set.

    One that cannot run on the model is told as such, not raised: the others go on.

    Args:
        optim: the optimizer, which the range of learning rates goes by.
        metric: what a strategy's own search goes by.
        epochs: of each training.
        model: a model like those it trains.
        untuned: options that stay as they are, as ``strategy.option``; those that are not at their default do anyway.
    """
    made, notes, refusal = [], [], ""
    configs = tuple(configs)
    free_momentum = all(_at_default(config, MOMENTUM) for config in configs) and settings.batch_norm_momentum > 0
    space: dict[str, LogRange | Choice] = {RATE: settings.rates(optim)}
    for config in configs:
        known = {field.name for field in options(type(config))}
        common: dict[str, Any] = {"metric": metric, "storage": "memory"}
        common |= {MOMENTUM: settings.batch_norm_momentum} if free_momentum else {}
        own = {n: v for n, v in common.items() if n in known and _at_default(config, n)}
        free = config.source_free()
        if bench.source is None and free is not None and config.needs().source_data == "required":
            config = free
            notes.append(f"{config.ft_type} runs in its source-free form, since no source data were given")
        changed = dataclasses.replace(config, **own)
        # The look at the data is cut, not left out: what it finds is part of the strategy.
        # An epoch of several source models costs as many.
        room = SEARCH_SHARE * settings.trials * epochs / max(1, len(config.sources()))
        try:
            changed = changed.within(room, model) if changed.measures() else changed
        except (OptionError, AnatomyError) as error:
            refusal = str(error)
        made.append(changed)
        space |= {
            f"{config.ft_type}.{option}": part
            for option, part in type(config).tuned.items()
            if _at_default(config, option) and f"{config.ft_type}.{option}" not in untuned
        }
    return Entrant(name, tuple(made), space, bench, tuple(notes), refusal)


def _at_default(config: FTConfig, name: str) -> bool:
    return getattr(config, name) == next(f.default for f in options(type(config)) if f.name == name)
