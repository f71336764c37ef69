"""Candidates of block-wise fine-tuning: groups of layers that may be adapted, with their depth in the network.

Reference: Barakat and Huang, "Improving Reliability of Fine-tuning with Block-wise Optimisation",
arXiv:2301.06133. The schemes ``stage`` and ``block`` are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers.utils import logging

from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import EVERYTHING, Names
from hf_ft.models.parts import Anatomy, Part
from hf_ft.models.weight_layers import (
    Layer,
    PlacedLayer,
    lacks_separators,
    placed_layers,
    size_of,
    trainable_sizes,
    weight_layers,
)

__all__ = [
    "SCHEMES",
    "Candidate",
    "Layer",
    "Scheme",
    "baseline_candidates",
    "candidates",
    "find_candidate",
    "last_quarter",
    "quarter_of",
    "top_layers",
    "weight_layers",
]

Scheme = Literal["layer", "top_layers", "segment", "window", "stage", "block"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A group of layers that may train together with the head.

    Attributes:
        name: ``stage3``, ``layer17``, ``window5-7`` (first and last layer), ``segment2``, ``top3`` (number of
            layers); all but the last are indexed from 0 at the input.
        modules: modules to train, for :attr:`hf_ft.core.plan.Stage.trains`, without the head.
        layers: 0-based indices into :func:`weight_layers`, ascending.
        quarter: quarter of the depth, 1 to 4, see :func:`quarter_of`; 0 without layers.
        parameters: number of trained parameters, without the head's.
    """

    name: str
    modules: Names
    layers: tuple[int, ...]
    quarter: int
    parameters: int

    @property
    def centre(self) -> float:
        """Midpoint of the first and last layer; -1 without layers."""
        return (self.layers[0] + self.layers[-1]) / 2 if self.layers else -1.0


def quarter_of(layers: Sequence[int], total: int) -> int:
    r"""The quarter of the depth that contains the centre of the given layers; 0 without layers.

    .. math:: \lfloor 4 c / L \rfloor + 1, \quad c = (\text{first} + \text{last}) / 2

    A network of fewer than four layers has no fourth quarter.

    Args:
        layers: 0-based indices, ascending.
        total: number of layers of the network, :math:`L`.

    Reference: ours; the paper speaks of quarters of the network.
    """
    return 2 * (layers[0] + layers[-1]) // total + 1 if layers else 0


def candidates(
    model: nn.Module, scheme: Scheme | str, *, length: int = 3, head: str | None = None, blocks: str | None = None
) -> tuple[Candidate, ...]:
    """The candidates of a scheme, from the output to the input.

    ``layer``: each layer alone. ``segment``: the layers between two poolings or activations; if the blocks call
    these as functions, the cuts are at the ends of the blocks, with a warning. ``window``: every run of ``length``
    consecutive layers. ``stage``: the stages of the architecture, or each block of a plain transformer; the neck
    belongs to the last one. ``block``: each block of :func:`~hf_ft.models.anatomy.anatomy`, and the neck if it contains
    layers (a lone norm joins the last block). In both, the stem is a separate candidate, so that every weight
    outside the head is in exactly one candidate. The same holds for the other schemes, except for parameters of the
    stem outside any layer (class token).
    ``top_layers`` needs scores: see :func:`top_layers`.

    Args:
        model: the model before training; parameters already frozen do not count in ``parameters``.
        length: number of layers per window.
        head: as for :func:`~hf_ft.models.anatomy.anatomy`.
        blocks: likewise.

    Raises:
        OptionError: if the scheme is unknown or ``top_layers``, a window does not fit, or everything is frozen.
        AnatomyError: if head or blocks cannot be found.

    Reference: Barakat and Huang, arXiv:2301.06133.
    """
    if scheme not in SCHEMES:
        raise OptionError(f"scheme={scheme!r} is unknown. Choose one of {', '.join(SCHEMES)}.")
    if scheme == "top_layers":
        raise OptionError(
            "scheme='top_layers' combines the best layers of a search with scheme='layer', so it needs that search's "
            "ranking: hf_ft.strategies.blockwise.candidates.top_layers(model, ranked_layers). Without one, choose one "
            f"of {', '.join(name for name in SCHEMES if name != scheme)}."
        )
    found = anatomy(model, head=head, blocks=blocks)
    placed = placed_layers(model, found)
    if not placed:
        raise OptionError("all parameters outside the head are frozen (requires_grad=False): unfreeze some of them.")
    if scheme in ("stage", "block"):
        made = _by_parts(model, found, placed, scheme)
    else:
        runs = _runs(model, found, placed, scheme, length)
        made = [_candidate(name, indices, [p.layer for p in placed]) for name, indices in runs]
    return tuple(reversed(made))


def top_layers(
    model: nn.Module, ranked_layers: Sequence[int], *, head: str | None = None, blocks: str | None = None
) -> tuple[Candidate, ...]:
    """The best layers combined: ``top1``, ``top2``, ... up to all ranked layers.

    Args:
        model: the model before training.
        ranked_layers: indices into :func:`weight_layers`, best first, as ranked by a search with ``layer``.
        head: as for :func:`~hf_ft.models.anatomy.anatomy`.
        blocks: likewise.

    Raises:
        OptionError: if there is no index, or an index is repeated or out of range.

    Reference: Barakat and Huang, arXiv:2301.06133.
    """
    layers = weight_layers(model, head=head, blocks=blocks)
    ranked = tuple(ranked_layers)
    wrong = [index for index in ranked if not 0 <= index < len(layers)]
    if wrong or not ranked or len(set(ranked)) < len(ranked):
        raise OptionError(
            f"ranked_layers={list(ranked)} must list distinct layer indices from 0 to {len(layers) - 1}, best first."
        )
    return tuple(_candidate(f"top{k}", sorted(ranked[:k]), layers) for k in range(1, len(ranked) + 1))


def baseline_candidates(
    model: nn.Module, *, head: str | None = None, blocks: str | None = None
) -> dict[str, Candidate]:
    """The baselines of a search: ``head`` (the classifier only, no layer) and ``all`` (everything)."""
    found = anatomy(model, head=head, blocks=blocks)
    sizes = trainable_sizes(model)
    every = tuple(range(len(placed_layers(model, found))))
    size = sum(sizes.values()) - size_of(found.head.modules, sizes)
    return {
        "head": Candidate("head", (), (), 0, 0),
        "all": Candidate("all", EVERYTHING, every, quarter_of(every, len(every)), size),
    }


def find_candidate(candidates: Iterable[Candidate], wanted: str | int) -> Candidate:
    """Look up a candidate by name, or by index: 0 is nearest the input, -1 nearest the output.

    Raises:
        OptionError: if there is no such candidate; the message lists the existing ones.
    """
    ordered = _by_depth(candidates)
    if isinstance(wanted, str):
        named = [candidate for candidate in ordered if candidate.name == wanted]
    else:
        named = [ordered[wanted]] if -len(ordered) <= wanted < len(ordered) else []
    if not named:
        names = [candidate.name for candidate in ordered]
        shown = ", ".join(names if len(names) <= 24 else [*names[:3], "...", *names[-3:]])
        raise OptionError(
            f"there is no candidate {wanted!r}. From input to output, the candidates are {shown}: give a name, or an "
            f"index from 0 to {len(names) - 1} (-1 is the one nearest the output)."
        )
    return named[0]


def last_quarter(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate whose centre is nearest the output, the last of the fourth quarter: a choice without a search.

    If none lies in the fourth quarter (few layers, or a wide last stage centred before it), it is the last of an
    earlier quarter, as given by ``.quarter``.

    Raises:
        OptionError: if there are no candidates.
    """
    ordered = _by_depth(candidates)
    if not ordered:
        raise OptionError("there are no candidates to choose from.")
    return ordered[-1]


def _by_depth(candidates: Iterable[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.centre)


def _candidate(name: str, indices: Sequence[int], layers: Sequence[Layer]) -> Candidate:
    modules = tuple(module for index in indices for module in layers[index].modules)
    size = sum(layers[index].parameters for index in indices)
    return Candidate(name, modules, tuple(indices), quarter_of(indices, len(layers)), size)


def _runs(
    model: nn.Module, found: Anatomy, placed: Sequence[PlacedLayer], scheme: str, length: int
) -> list[tuple[str, Sequence[int]]]:
    """Names and layer indices of candidates made of consecutive layers, from the input."""
    total = len(placed)
    if scheme == "layer":
        return [(f"layer{index}", (index,)) for index in range(total)]
    if scheme == "window":
        if not 1 <= length <= total:
            raise OptionError(f"length={length} must be between 1 and {total}, the number of layers.")
        starts = range(total - length + 1)
        return [(f"window{first}-{first + length - 1}", range(first, first + length)) for first in starts]
    if lacks_separators(model, found):
        logger.warning_once(
            f"{type(model).__name__}: no block contains a pooling or activation module (they are functions here), so "
            "segments end where blocks end."
        )
    grouped = itertools.groupby(range(total), key=lambda index: placed[index].segment)
    return [(f"segment{number}", tuple(indices)) for number, (_, indices) in enumerate(grouped)]


def _by_parts(model: nn.Module, found: Anatomy, placed: Sequence[PlacedLayer], scheme: str) -> list[Candidate]:
    """Stem, stages or blocks, and neck; a part without layers (a norm, a class token) joins its neighbour."""
    sizes = trainable_sizes(model)
    made: list[tuple[str, list[str], list[int]]] = []
    waiting: list[str] = []
    for name, parts in _groups(found, scheme):
        names = {part.name for part in parts}
        modules = [module for part in parts for module in part.modules]
        inside = [index for index, layer in enumerate(placed) if layer.part in names]
        if inside:
            made.append((name, [*waiting, *modules], inside))
            waiting = []
        elif size_of(modules, sizes):
            (made[-1][1] if made else waiting).extend(modules)
    return [
        Candidate(name, tuple(modules), tuple(layers), quarter_of(layers, len(placed)), size_of(modules, sizes))
        for name, modules, layers in made
    ]


def _groups(found: Anatomy, scheme: str) -> list[tuple[str, list[Part]]]:
    if scheme == "stage":  # the neck works at the last stage's resolution and belongs to it
        groups = [(f"stage{i}", [found.blocks[j] for j in indices]) for i, indices in enumerate(found.stages)]
        groups[-1][1].append(found.neck)
        return [("stem", [found.stem]), *groups]
    blocks = [(block.name, [block]) for block in found.blocks]
    return [("stem", [found.stem]), *blocks, ("neck", [found.neck])]
