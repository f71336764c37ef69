"""The tables of docs/scale.md on memory: what a process was measured to hold, and what a model of memory predicts.

tests/benchmarks/memory_ranks.py writes both: the measured bytes, and the sizes to which the model is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from docs.tools.measured import NOT_YET, _read
from hf_ft.core.config import BASELINE
from hf_ft.engine.run import Run

FLOAT, HALF = 4, 2  # bytes per number in float32 and in bfloat16
MOMENTS = 2  # numbers that AdamW keeps for each trained one
GATHERED = 3  # copies of a layer while FSDP2 gathers: its own, and the buffers of this layer and the next
SHOWN = ((False, 1), (False, 2), (True, 2), (True, 4), (True, 8))  # sharded, processes
Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


# --- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How many numbers a run holds.

    Attributes:
        weights: parameters and buffers of the model and of the terms' modules.
        trained: parameters that any stage trains.
        starts: starting weights with which terms compare.
        reference: parameters and buffers of the reference model.
        average: averaged weights.
        origin: starting weights that a choice among final models needs, in CPU memory.
        layer: parameters of the largest layer that FSDP2 gathers by itself.
        layer_trained: parameters of this layer that are trained.
        outside: parameters outside such layers.
    """

    weights: int
    trained: int
    starts: int
    reference: int
    average: int
    origin: int
    layer: int
    layer_trained: int
    outside: int


def sizes(run: Run) -> Sizes:
    """The sizes of a run whose model is not sharded; its tensors may be on the meta device."""
    parameters, modules = dict(run.model.named_parameters()), run.plan.term_modules
    trained = [parameters[name] for name in run.trained]
    own = {id(parameter) for parameter in trained}
    layers = [list(layer.parameters()) for layer in _layers(run.model)]
    largest = max(layers, key=_count, default=[])
    reference = run.reference.model if run.reference is not None and not run.reference.adapters else nn.Module()
    return Sizes(
        weights=_size(run.model) + _size(modules),
        trained=_count(trained) + _count(p for p in modules.parameters() if p.requires_grad),
        starts=_count(run.anchors.values()),
        reference=_size(reference),
        average=0 if run.average is None else _count(trained),
        origin=0 if run.origin is None else _count(run.origin.weights.values()),
        layer=_count(largest),
        layer_trained=_count(parameter for parameter in largest if id(parameter) in own),
        outside=_count(parameters.values()) - sum(map(_count, layers)),
    )


def _size(module: nn.Module) -> int:
    return _count(module.parameters()) + _count(module.buffers())


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _layers(model: nn.Module) -> list[nn.Module]:
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def held(of: Sizes, processes: int = 1, sharded: bool = False) -> dict[str, float]:
    """Bytes that a process holds just before an optimizer step, by purpose.

    All are float32. DDP sends gradients from buckets, which hold a second copy of each.

    Args:
        sharded: whether each process keeps a part of everything (FSDP2), or all of it (DDP).
    """
    share = FLOAT / processes if sharded else float(FLOAT)
    return {
        "weights": share * of.weights,
        "gradients": share * of.trained,
        "buckets": share * of.trained if processes > 1 and not sharded else 0.0,
        "optimizer": share * MOMENTS * of.trained,
        "starting weights": share * of.starts,
        "reference model": share * of.reference,
        "average": share * of.average,
    }


def peak(of: Sizes, processes: int = 1, sharded: bool = False) -> float:
    """Bytes that a process needs in a step under bfloat16 autocast, without activations.

    Unsharded weights are cast for the forward pass, and the copies are freed by the time all gradients exist. Shards
    are gathered layer by layer, when the gradients of other layers already exist. A penalty on weights gets its
    gradients first, and keeps its differences from the starting weights until then.
    """
    parts = held(of, processes, sharded)
    gradients = parts.pop("gradients")
    if sharded:
        cast = HALF * of.outside + GATHERED * HALF * of.layer + (HALF + FLOAT) * of.layer_trained
    else:
        cast = HALF * of.weights
    together = sharded or of.starts > 0
    passing = gradients + cast if together else max(gradients, cast)
    return sum(parts.values()) + passing + parts["starting weights"]


# --- the tables -------------------------------------------------------------------------------------------


def table_of_measured(table: Table) -> str:
    """Measured bytes of each strategy, and how far the model is off."""
    content = _read("memory_ranks.json")
    if content is None:
        return NOT_YET
    ways = sorted({(row["sharded"], row["ranks"]) for row in content["measured"]})
    found = {(row["strategy"], row["sharded"], row["ranks"]): row for row in content["measured"]}
    rows = []
    for name in content["small"]:
        cells = (found.get((name, *way)) for way in ways)
        rows.append((_link(name), *("" if row is None else _pair(row) for row in cells)))
    gaps = [(row["sharded"], *gap) for row, gap in zip(content["measured"], deviations(content), strict=True)]
    whole, shards = (max(abs(gap) for sharded, _, gap in gaps if sharded == wanted) for wanted in (False, True))
    about = content["about"]
    note = (
        "MB per process: held just before the optimizer's step / at the peak of that step. Activations are included; "
        "what stays in CPU memory when training on a GPU is not. A ViT with "
        f"{about['parameters'] / 1e6:.1f} million parameters in four layers, one image of five tokens per process, "
        f"AdamW, `bf16`, gloo on a CPU; torch {about['torch']}. The model is off by at most "
        f"{max(abs(gap) for _, gap, _ in gaps):.1%} for what is held; for the peak, by at most {whole:.0%} without "
        f"sharding and {shards:.0%} with it, where peaks differ by up to two layers even between training runs that "
        "should be equal (`full`, `lp_ft` and `wise_ft` at their end)."
    )
    return table(("strategy", *map(_way, ways)), rows) + "\n\n" + note


def deviations(content: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """The relative error of the model for each measured row: of what is held, and of the peak."""
    for row in content["measured"]:
        of, how = Sizes(**content["small"][row["strategy"]]), (row["ranks"], row["sharded"])
        yield sum(held(of, *how).values()) / on_device(row["held"]) - 1, peak(of, *how) / row["peak"] - 1


def on_device(parts: Mapping[str, int]) -> int:
    """Everything except what stays in CPU memory when training on a GPU."""
    return sum(parts.values()) - parts["origin"]


def _pair(row: Mapping[str, Any]) -> str:
    return f"{on_device(row['held']) / 1e6:.1f} / {row['peak'] / 1e6:.1f}"


def _way(way: tuple[bool, int]) -> str:
    sharded, processes = way
    return f"{'FSDP2' if sharded else 'DDP'}, {processes}" if processes > 1 else "one process"


def table_of_modelled(table: Table) -> str:
    """What the model predicts for large models."""
    content = _read("memory_ranks.json")
    if content is None:
        return NOT_YET
    carried = {row["strategy"] for row in content["measured"] if row["sharded"]}
    parts = []
    for title, strategies in content["large"].items():
        rows = []
        for name, numbers in strategies.items():
            of = Sizes(**numbers)
            needed = [
                _gigabytes(peak(of, processes, sharded)) if name in carried or not sharded else ""
                for sharded, processes in SHOWN
            ]
            host = _gigabytes(FLOAT * of.origin) if of.origin else ""
            rows.append((_link(name), f"{of.trained / 1e6:.0f} M", *needed, host))
        heads = (
            "strategy",
            "trained",
            *(_way(way).replace("DDP, 2", "DDP, 2 to 8") for way in SHOWN),
            "also in CPU memory",
        )
        weights = Sizes(**strategies[BASELINE]).weights
        about = f"**{title}**, {weights / 1e9:.2f} billion parameters, {_gigabytes(FLOAT * weights)} GB"
        parts.append(f"{about}:\n\n{table(heads, rows)}")
    return "\n\n".join(parts)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f}"


def _link(name: str) -> str:
    return f"[`{name}`](methods/{name}.md)"
