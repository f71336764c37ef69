"""The table of docs/scale.md: where each strategy runs, and what it keeps beside the model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from peft import LoraConfig, get_peft_model
from torch import nn

from docs.tools.cells import OPTIONS
from docs.tools.models import read
from hf_ft.core.compose import chooses_rate
from hf_ft.core.config import FTConfig
from hf_ft.core.options import options
from hf_ft.engine.run import Run
from hf_ft.engine.set_up import set_up
from hf_ft.testing import suited, tiny_resnet, tiny_vit
from hf_ft.testing.training import equipped, make_trainer

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]
LOOK = "`measure_samples`"
CHOSEN = "as for the strategy it chooses"


def table_of_places(strategies: Mapping[str, type[FTConfig]], table: Table) -> str:
    """For each strategy with its defaults: where it trains, what it keeps, and what is computed once."""
    rows = []
    for name, kind in strategies.items():
        config, link = kind(**OPTIONS.get(name, {})), f"[`{name}`](methods/{name}.md)"
        if chooses_rate(config):
            rows.append((link, "yes", next(_sharded(kind)), f"with {LOOK}", CHOSEN, CHOSEN))
            continue
        model = next(model for model in (tiny_vit(), tiny_resnet()) if config.adapted(model) is not None)
        size, run = _size(model), _run(config, model)
        rows.append(
            (
                link,
                "yes" + ("; its term sees one process's batch" if any(t.couples_batch for t in run.plan.terms) else ""),
                next(_sharded(kind)),
                _streamed(kind(), run),
                ", ".join(_beside(config, run, size)),
                _recorded(name, run),
            )
        )
    return table(("strategy", "one process, DDP", "FSDP2", "stream", "kept beside the model", "computed once"), rows)


def _run(config: FTConfig, model: nn.Module) -> Run:
    """The strategy set up for a tiny model, after its measurements."""
    fitting = suited(config, model)
    if not fitting.must_measure():
        return set_up(equipped(model, fitting), fitting)
    with tempfile.TemporaryDirectory() as folder:
        return make_trainer(model, fitting, folder)._start_run()


def _sharded(kind: type[FTConfig]) -> Iterator[str]:
    """Whether it trains a model with sharded parameters, or the option with which it does."""
    if kind().needs().sharded:
        yield "yes"
    for option in options(kind):
        value = not option.default
        if isinstance(option.default, bool) and kind(**{option.name: value}).needs().sharded:
            yield f"with `{option.name}={value}`"
    yield "no"


def _streamed(config: FTConfig, run: Run) -> str:
    if config.must_measure() or run.plan.tensor_rates is not None:
        return f"with {LOOK}"
    if run.plan.select:
        return f"yes; BatchNorm needs {LOOK}"
    if config.measures():
        return f'yes; `head_lr="auto"` needs {LOOK}'
    return "yes"


def _beside(config: FTConfig, run: Run, size: int) -> Iterator[str]:
    """What a process keeps beside the model (originally of this size), its gradients and the optimizer's state."""
    if run.anchors:
        yield "starting weights"
    if run.reference is not None:
        yield "reference model" + (" (none beside adapters)" if _base_serves(config) else "")
    if run.average is not None:
        yield "average"
    if run.origin is not None:
        yield "starting weights in CPU memory"
    if _size(run.plan.term_modules):
        yield "modules of its term"
    if _size(run.model) > size:
        yield "modules in the model"


def _base_serves(config: FTConfig) -> bool:
    """Whether the base of a model that trains only its adapters serves as the reference."""
    tuner = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    reference = _run(config, get_peft_model(tiny_vit(), tuner)).reference
    return reference is not None and bool(reference.adapters)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _recorded(name: str, run: Run) -> str:
    """What was recorded in a cache, and for how many of the classes of docs/models.md that train."""
    trained = (row for (_, of), row in read().items() if of == name and row["outcome"] == "works")
    found = Counter(bool(row.get("cached")) for row in trained)
    if not found[True]:
        return ""
    return f"{'reference states' if run.reference is not None else 'frozen part'} ({found[True]} of {found.total()})"
