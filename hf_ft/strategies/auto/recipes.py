"""The strategies to choose from, in the order in which they are tried, in the form that fits the model and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_ft.advice.advise import advise
from hf_ft.advice.evidence import shipped
from hf_ft.advice.rules import config_at_hand, neutral_order
from hf_ft.core import Context, FTConfig, OptionError, advising, config_class, strategies
from hf_ft.core.compose import recommended_arguments
from hf_ft.core.config import BASELINE
from hf_ft.errors import AnatomyError
from hf_ft.models.source_head import has_source_head

REFUSED = (OptionError, AnatomyError)
COMMON = ("head", "blocks", "batch_norm_momentum", "norm_mode")  # options that are passed on if set


@dataclass(frozen=True)
class Recipe:
    """A strategy that may be chosen.

    Attributes:
        config: in the form that fits the model.
        rate: its learning rate; None for that of the arguments, or one that it fits itself.
        expected: its expected gain over full fine-tuning.
    """

    config: FTConfig
    rate: float | None
    expected: float

    @property
    def name(self) -> str:
        return self.config.ft_type

    @property
    def cheap(self) -> bool:
        """Whether it declares that frozen parts are skipped for much of the run."""
        return self.config.cost is not None and self.config.cost <= advising.PART_OF_THE_RUN


def measured_advice(model: nn.Module, context: Context | None) -> tuple[Mapping[str, float], dict[str, Any]]:
    """The expected gain of each strategy, and what it is derived from, as in ``hf-ft advise``, on the training samples.

    Without a context, or without one class per sample, nothing is measured, and earlier comparisons alone count.
    """
    try:
        if context is None:
            raise OptionError("nothing is measured")
        advice = advise(model, range(context.samples.count), context.samples.read, groups=context.groups)
    except REFUSED:
        return {name: shipped().expected(name) for name in strategies()}, {}
    return {one.strategy: one.score for one in advice.recommendations}, advice.signals.to_dict()


def recipes(
    chooser: FTConfig, model: nn.Module, optim: str, rates: bool, expected: Mapping[str, float], wanted: Collection[str]
) -> tuple[list[Recipe], dict[str, str]]:
    """The strategies that can run, in the order in which they are tried, and why the others cannot.

    The one with the highest expected gain comes first, so that any budget has room for it, then those that are cheap to
    try, then the others; each group is sorted by expected gain, then by cost.

    Args:
        chooser: the strategy that chooses; it is not among them, and its common options apply to all.
        optim: the optimizer in use, ``sgd`` or another.
        rates: whether each is trained at the rate it recommends.
        wanted: names to choose from; empty for all.
    """
    found, declined = [], {}
    order = neutral_order()
    names = sorted(strategies(), key=lambda name: order.index(name) if name in order else len(order))
    for name in sorted(names, key=lambda name: -expected.get(name, 0.0)):
        if name == chooser.ft_type or (wanted and name not in (*wanted, BASELINE)):
            continue
        try:
            config = _fitting(name, chooser, model)
        except REFUSED as error:
            declined[name] = str(error)
            continue
        rate = recommended_rate(config, optim, model) if rates else None
        found.append(Recipe(config, rate, expected.get(name, 0.0)))
    return found[:1] + sorted(found[1:], key=lambda one: not one.cheap), declined


def recommended_rate(config: FTConfig, optim: str, model: nn.Module) -> float | None:
    """The learning rate that a strategy, or else the baseline, recommends for a model; None if it fits its own.

    Args:
        optim: the optimizer in use, ``sgd`` or another.
    """
    if "learning_rate" not in config.recommended:
        config = config_class(BASELINE)()
    found = recommended_arguments([config], optim, model).get("learning_rate")
    return None if found is None else float(found.value)


def _fitting(name: str, chooser: FTConfig, model: nn.Module) -> FTConfig:
    """A strategy in the form that fits, with the options that the chooser shares with it.

    Raises:
        OptionError: if there is none; the message says why.
    """
    config = config_at_hand(name, source_data=False)
    if config is None:
        raise OptionError("it has options without a default")
    if config.sources_option:
        raise OptionError("it trains several models")
    if not config.plain:
        raise OptionError("the model it produces needs this package")
    if config.averages:
        raise OptionError("it averages what another strategy trains: compose the two")
    if config.cost is not None and config.cost >= advising.WITH_A_SEARCH:
        raise OptionError("it runs a search of its own")
    if config.needs().source_data == "required":
        raise OptionError("it needs the pretraining data")
    if config.needs().source_head and not has_source_head(model):
        raise OptionError("it needs the pretrained head")
    fitting = config.adapted(model)
    if fitting is None:
        raise OptionError("it has no form for this model")
    set_here = {name: getattr(chooser, name) for name in COMMON if getattr(chooser, name) != getattr(FTConfig, name)}
    fitting = dataclasses.replace(fitting, **set_here)
    fitting.check_model(model)
    return fitting
