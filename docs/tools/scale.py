"""The tables of docs/scale.md: which strategy trains on a stream, and which one shards of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from hf_ft.core.config import FTConfig
from hf_ft.core.options import options
from hf_ft.core.plan import Plan
from hf_ft.engine.set_up import check
from hf_ft.testing import tiny_resnet, tiny_vit
from hf_ft.testing.training import equipped

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


def table_of_streaming(strategies: Mapping[str, type[FTConfig]], table: Table) -> str:
    """For each strategy by its defaults: whether it needs a look at some samples, or makes use of one."""
    rows = [(f"[`{name}`](methods/{name}.md)", *_how(kind())) for name, kind in strategies.items()]
    return table(("strategy", "without a look", "what a look is for"), rows)


def list_of_sharded(strategies: Mapping[str, type[FTConfig]]) -> str:
    """The strategies that train a model whose parameters are sharded, some only with an option."""
    links = [f"[`{name}`](methods/{name}.md){how}" for name, kind in strategies.items() for how in _sharded(kind)]
    return f"{', '.join(links[:-1])} and {links[-1]}"


def _sharded(kind: type[FTConfig]) -> Iterator[str]:
    if kind().needs().sharded:
        yield ""
        return
    for option in options(kind):
        value = not option.default
        if isinstance(option.default, bool) and kind(**{option.name: value}).needs().sharded:
            yield f" with `{option.name}={value}`"


def _how(config: FTConfig) -> tuple[str, str]:
    if config.must_measure():
        return "no", "its measurement before training"
    plans = list(_plans(config))
    if any(plan.tensor_rates is not None for plan in plans):
        return "no", "its rates, found once"
    if any(plan.select for plan in plans):
        return "without BatchNorm only", "BatchNorm statistics of the models it chooses from"
    if config.measures():
        return 'yes, `head_lr="auto"` is the learning rate', "the head's learning rate"
    return "yes", ""


def _plans(config: FTConfig) -> Iterator[Plan]:
    """Its plans for a network with BatchNorm and for one without, as far as it goes with them."""
    for make in (tiny_resnet, tiny_vit):
        model = equipped(make(), config)
        fitting = config.adapted(model)
        if fitting is not None:
            yield check((fitting,), model, {}, tuple(name for name, _ in model.named_parameters()))
