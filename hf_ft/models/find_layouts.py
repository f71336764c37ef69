"""Find the layouts of layers (:mod:`hf_ft.models.layouts`) by running a model on a few samples of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.models.border import SOURCE_LOGITS
from hf_ft.models.feature_hooks import INPUT, Batch, Taps, tap
from hf_ft.models.layouts import PLAIN, Layout, Layouts, Tokens
from hf_ft.models.names import Names
from hf_ft.models.preserve import random_states_kept, untouched
from hf_ft.models.probing import TokenRow, half_size, leading, of_samples, token_row

logger = logging.get_logger(__name__)
PADDED = 12  # padded tokens that are changed, each in a separate sample
STRIDES = range(1, PADDED // 3 + 1)  # each needs a few positions to be distinguished from others
NOISE = 16  # times the precision of a state; equal rows of a batch differ by rounding
HEAD = "head"
_UNKNOWN = (
    "layers {layers}: it could not be determined which of their positions are padding, so padding counts like the "
    "rest of a sample. Name other layers, or use samples of one length."
)
States = Mapping[str, Tensor]
Run = Callable[[Mapping[str, Any]], States]


def find_layouts(model: nn.Module, layers: Sequence[str], batch: Batch) -> dict[str, Layout]:
    """The layout of each layer, by name; plain for one that is not called.

    Runs the model a few times in evaluation mode. The model, its modes and the random states are left unchanged.

    Args:
        layers: as in :mod:`hf_ft.models.feature_hooks`.
        batch: a few samples, on the model's device.
    """

    def run(inputs: Mapping[str, Any]) -> States:
        states: dict[str, Tensor] = {}
        handles = [tap(model, layer, partial(states.setdefault, layer)) for layer in layers]
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return states

    return {**dict.fromkeys(layers, PLAIN), **_found(model, batch, run)}


def laid_out(layers: Iterable[str]) -> Names:
    """The layers that have a layout: outputs of modules. Inputs of modules stay as they are."""
    return tuple(dict.fromkeys(one for one in layers if not one.startswith(INPUT) and one != SOURCE_LOGITS))


def look_at(layouts: Layouts, model: nn.Module, layers: Sequence[str], batch: Batch) -> None:
    """Add the layouts of these layers to those known, unless they are known already."""
    outputs = laid_out(layers)
    if layouts.lacks(outputs):
        layouts.add(find_layouts(model, outputs, leading(batch)))


def head_layout(model: nn.Module, head: Names, batch: Batch) -> Layout:
    """The layout of what enters the head."""

    def run(inputs: Mapping[str, Any]) -> States:
        with Taps(model, head=head) as taps:
            model(**inputs)
        return {} if taps.features is None else {HEAD: taps.features}

    return _found(model, batch, run).get(HEAD, PLAIN)


def _found(model: nn.Module, batch: Batch, states: Run) -> dict[str, Layout]:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    finder = _Finder(states)
    with untouched(model):
        given = finder.try_on(dict, inputs)
        if not any(state.dim() in (3, 4) and state.is_floating_point() for state in given.values()):
            return dict.fromkeys(given, PLAIN)
        row = token_row(model, inputs)
        return finder.of_images(inputs, given) if row is None else finder.of_texts(row, given)


class _Finder:
    """What a model does with inputs of several sizes."""

    def __init__(self, states: Run) -> None:
        self.states = states

    def try_on(self, make: Callable[..., Mapping[str, Any]], *sizes: Any) -> States:
        """The states for inputs that the model may reject; empty if it does, or if the inputs cannot be made."""
        try:
            with random_states_kept(0):  # the same random numbers each time
                return self.states(make(*sizes))
        except Exception:  # whatever a model raises for a size that it does not support
            return {}

    def of_images(self, inputs: Batch, given: States) -> dict[str, Layout]:
        two, three = (self.try_on(of_samples, inputs, count) for count in (2, 3))
        smaller = self.try_on(half_size, inputs)
        return {layer: Layout(_order(layer, two, three, [smaller]), None) for layer in given}

    def of_texts(self, row: TokenRow, given: States) -> dict[str, Layout]:
        length = next((n for n in row.lengths if self.try_on(row.inputs, 2, n)), None)
        if length is None:
            return dict.fromkeys(given, PLAIN)
        two, three = (self.try_on(row.inputs, count, length) for count in (2, 3))
        shorter, half = (self.try_on(row.inputs, 2, n) for n in (length - 1, length // 2))
        layouts = {layer: Layout(_order(layer, two, three, [shorter, half])) for layer in given}
        if row.mask is None:
            return layouts
        seen: dict[str, list[int | None]] = {
            layer: [_positions(layout, states.get(layer)) for states in (two, shorter, half)]
            for layer, layout in layouts.items()
        }
        usual = length, length - 1
        other = [n for n, (long, short, _) in seen.items() if long and (long, short or length - 1) != usual]
        count = min(PADDED, length - 3)
        for padding in (count, 0) if other else ():  # some layers set padded positions to zero, whatever they contain
            marks = self._marks(row, length, padding, range(length - count, length), {n: layouts[n] for n in other})
            for layer in list(other):
                tokens = _tokens(marks[layer], length, *seen[layer][:2]) if layer in marks else None
                layouts[layer] = Layout(layouts[layer].order, tokens)
                if tokens is not None:
                    other.remove(layer)
        # Latents have nothing to do with the length of the text.
        unknown = [layer for layer in other if len({*seen[layer]} - {None}) > 1]
        if unknown:
            logger.warning_once(_UNKNOWN.format(layers=", ".join(map(repr, unknown))))
        return layouts

    def _marks(
        self, row: TokenRow, length: int, padding: int, places: range, layouts: Mapping[str, Layout]
    ) -> dict[str, dict[int, int]]:
        """For each layer, the position that changes most with each of some tokens, if any does."""
        states = self.try_on(lambda: row.with_changes(row.inputs(len(places) + 1, length, padding), places))
        marks = {}
        for layer, layout in layouts.items():
            if layer in states:
                precision = torch.finfo(states[layer].dtype).eps
                state = layout.arranged(states[layer]).float().cpu()
                change = (state[1:] - state[:1]).norm(dim=2)
                least = NOISE * precision * float(state[0].norm(dim=1).mean())
                largest, where = (values.tolist() for values in change.max(dim=1))
                marks[layer] = {p: at for p, size, at in zip(places, largest, where, strict=True) if size > least}
        return marks


def _tokens(marks: Mapping[int, int], length: int, long: int | None, short: int | None) -> Tokens | None:
    """Which tokens the positions of a layer stand for, if they follow them at regular distances.

    Args:
        marks: the position that belongs to each of some tokens.
        length: number of tokens.
        long: number of positions for this many.
        short: number of positions for one token fewer.
    """
    if len(set(marks.values())) < 2 or long is None:
        return None
    place, position = next(iter(marks.items()))
    for stride in STRIDES:
        for first in range(place - stride * position - stride + 1, place - stride * position + 1):
            if all((token - first) // stride == at for token, at in marks.items()):
                always = short is not None and long - length == short - (length - 1)
                after = max(0, long - length + first) if stride == 1 and always else 0
                return Tokens(stride, first, after)
    return None


def _order(layer: str, two: States, three: States, sizes: Sequence[States]) -> tuple[int, ...] | None:
    """The order of a layer's axes; None for the usual one, or if it cannot be determined.

    Args:
        two: states for two samples.
        three: for three.
        sizes: for two samples of other lengths or sizes.
    """
    first = two.get(layer)
    if first is None or first.dim() not in (3, 4):
        return None
    grown = _differing(first, three.get(layer))
    samples = grown[0] if len(grown) == 1 else 0
    others = [axis for axis in range(first.dim()) if axis != samples]
    differing = ([a for a in _differing(first, state.get(layer)) if a != samples] for state in sizes)
    along = next((axes for axes in differing if axes), [])
    if first.dim() == 3:
        order = (samples, *(along if len(along) == 1 else others[:1]))
    else:
        height, width, depth = (first.shape[axis] for axis in others)
        if not along and height == width != depth:  # a square map, and as many channels as it is neither high nor wide
            along = others[:2]
        channels = [axis for axis in others if axis not in along]
        order = (samples, *(channels if len(channels) == 1 else others[:1]))
    order += tuple(axis for axis in others if axis not in order)
    return None if order == tuple(range(first.dim())) else order


def _differing(one: Tensor, other: Tensor | None) -> list[int]:
    if other is None or other.dim() != one.dim():
        return []
    return [axis for axis in range(one.dim()) if one.shape[axis] != other.shape[axis]]


def _positions(layout: Layout, state: Tensor | None) -> int | None:
    return None if state is None or state.dim() != 3 else layout.arranged(state).shape[1]
