"""Inputs made from a few samples, to probe a network: with other content, other sizes, padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.models.feature_hooks import Batch

MASK, IDS = "attention_mask", "input_ids"
SHORTEST = 24  # tokens of a text that reveals how layers shorten it


def samples_in(batch: Batch) -> int:
    """The number of samples of a batch of model inputs."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)


def special_tokens(model: nn.Module) -> set[int]:
    """Token ids with a meaning of their own, by the fields of the model's config."""
    config: Any = getattr(model, "config", None)
    fields: dict[str, Any] = config.to_dict() if config is not None else {}
    nested = [value for value in fields.values() if isinstance(value, Mapping)]
    values = [v for part in (fields, *nested) for name, v in part.items() if str(name).endswith("_token_id")]
    flat = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values)
    return {value for value in flat if isinstance(value, int)}


def of_samples(batch: Batch, count: int) -> dict[str, Any]:
    """Inputs of this many samples, some of them several times if there are fewer."""
    given = samples_in(batch)
    rows = [row % given for row in range(count)]
    return {n: v[rows] if isinstance(v, Tensor) and v.dim() and len(v) == given else v for n, v in batch.items()}


def leading(batch: Batch, count: int = 2) -> dict[str, Any]:
    """The first few samples of a batch."""
    return of_samples(batch, min(count, samples_in(batch)))


def half_size(batch: Batch) -> dict[str, Any]:
    """Inputs with every second row and column of the images."""
    return {n: v[..., ::2, ::2] if isinstance(v, Tensor) and v.dim() > 3 else v for n, v in batch.items()}


def other_content(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Inputs of the same shapes and masks with other contents: numbers get noise, plain tokens are exchanged.

    Special tokens stay in place, since models use them to find the end of a text.
    """
    random = torch.Generator().manual_seed(0)
    special = torch.tensor(sorted(special_tokens(model)))
    result = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, Tensor) or not value.dim() or "mask" in name:
            continue
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=random).to(value)
            result[name] = value + noise * value.std().clamp_min(1e-3)
        elif name == IDS:
            result[name] = _exchanged(value, special.to(value))
        elif value.dim() > 2:  # boxes of words: those of the words before
            result[name] = value.roll(1, dims=1)
    return result


def _exchanged(ids: Tensor, special: Tensor) -> Tensor:
    """Each plain token becomes another one: of the same sequence, or its neighbour in the vocabulary."""
    plain = ~torch.isin(ids, special)
    values = ids[plain]
    distinct = values.unique()
    if len(distinct) < 2:
        return torch.where(plain, _neighbour(ids, special), ids)
    places = torch.searchsorted(distinct, values)
    result = ids.clone()
    result[plain] = distinct[(places + 1) % len(distinct)]
    return result


def _neighbour(ids: Tensor, special: Tensor) -> Tensor:
    """The next lower id that is not special; ids without one stay."""
    lower = ids
    for _ in range(len(special) + 1):
        lower = torch.where((lower == ids) | torch.isin(lower, special), lower - 1, lower)
    return torch.where(lower < 0, ids, lower)


@dataclass(frozen=True)
class TokenRow:
    """A single sample that is a sequence of tokens, from which texts of any length and padding are made.

    Attributes:
        tokens: columns with one entry per token, (1, n, ...); all of them valid.
        others: further inputs of the sample.
        mask: whether the model gets an attention mask.
        spare: places of plain tokens, which can be left out or repeated.
        lengths: numbers of tokens to try; the first that the model accepts is used.
        filler: two plain tokens, for padded places; None for sequences of numbers.
    """

    tokens: Mapping[str, Tensor]
    others: Mapping[str, Any]
    mask: Tensor | None
    spare: tuple[int, ...]
    lengths: tuple[int, ...]
    filler: tuple[int, int] | None

    def inputs(self, copies: int, length: int, padding: int = 0) -> dict[str, Any]:
        """The sample several times, with this many tokens, of which the last ones are padding."""
        places = self._places(length - padding)
        end = self.spare[-1]
        index = torch.tensor([*places, *[end] * padding], device=next(iter(self.tokens.values())).device)
        columns = {name: column[:, index] for name, column in self.tokens.items()}
        if padding and self.filler is not None and IDS in columns:
            columns[IDS][:, length - padding :] = self.filler[0]
        if self.mask is not None:
            columns[MASK] = self.mask.new_ones(1, length)
            columns[MASK][:, length - padding :] = 0
        whole = {**self.others, **columns}
        return {n: _copies(v, copies) if isinstance(v, Tensor) and v.dim() else v for n, v in whole.items()}

    def with_changes(self, inputs: dict[str, Any], places: range) -> dict[str, Any]:
        """Change only the token at the k-th place in sample k + 1."""
        rows, columns = torch.arange(1, len(places) + 1), torch.tensor(list(places))
        result = dict(inputs)
        for name in self.tokens:
            value = result[name]
            if name == IDS and self.filler is not None:
                a, b = self.filler
                changed = torch.where(value == b, a, b)
            elif value.is_floating_point():
                changed = value + 2 * value.std().clamp_min(1e-3)
            else:
                continue
            result[name] = value.clone()
            result[name][rows, columns] = changed[rows, columns]
        return result

    def _places(self, count: int) -> list[int]:
        """Which tokens make a text of this length: plain ones are left out or repeated."""
        total = next(iter(self.tokens.values())).shape[1]
        left_out = set(self.spare[max(0, len(self.spare) - max(0, total - count)) :])
        places = [place for place in range(total) if place not in left_out]
        at = places.index(self.spare[0]) if self.spare[0] in places else 0
        return places[:at] + [self.spare[0]] * (count - len(places)) + places[at:]


def token_row(model: nn.Module, batch: Batch) -> TokenRow | None:
    """The longest sample of a batch as a sequence of tokens; None if it is not one."""
    count, width = samples_in(batch), _width(batch)
    if width is None:
        return None
    mask = batch.get(MASK)
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    row = 0 if mask is None else int(mask.sum(dim=1).argmax())
    columns = {n: v[row : row + 1] for n, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == count}
    valid = torch.arange(width) if mask is None else mask[row].bool().nonzero().flatten().cpu()
    tokens = {n: v[:, valid.to(v.device)] for n, v in columns.items() if n != MASK and _of_tokens(v, width)}
    others = {n: columns.get(n, v) for n, v in batch.items() if n not in (*tokens, MASK, "labels")}
    special, filler = special_tokens(model), None
    spare = tuple(range(len(valid)))
    if IDS in tokens:
        ids = tokens[IDS].flatten().tolist()
        plain = sorted({int(token) for token in batch[IDS].unique().tolist()} - special)
        spare = tuple(place for place, token in enumerate(ids) if token not in special) or spare[:1]
        pair = plain[:2] if len(plain) > 1 else list(itertools.islice(_plain_ids(model, special), 2))
        filler = (pair[0], pair[1]) if len(pair) == 2 else None
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = min(SHORTEST, limit - 2) if isinstance(limit, int) else SHORTEST
    lengths = (max(width, longest), width)  # never beyond the last position: on a GPU, that would kill the process
    return TokenRow(tokens, others, mask, spare, lengths, filler) if tokens and spare else None


def _plain_ids(model: nn.Module, special: set[int]) -> Iterator[int]:
    size = getattr(getattr(model, "config", None), "vocab_size", None) or 0
    return (token for token in range(size - 1, -1, -1) if token not in special)


def _width(batch: Batch) -> int | None:
    """The number of tokens of a batch, or None if its samples are not sequences."""
    for name in (MASK, IDS):
        column = batch.get(name)
        if isinstance(column, Tensor) and column.dim() == 2:
            return int(column.shape[1])
    flat = (value for value in batch.values() if isinstance(value, Tensor) and value.dim() == 2)
    return next((int(value.shape[1]) for value in flat if value.is_floating_point()), None)  # sound


def _of_tokens(column: Tensor, width: int) -> bool:
    return column.dim() > 1 and column.shape[1] == width and not (column.dim() > 3 and column.is_floating_point())


def _copies(value: Tensor, copies: int) -> Tensor:
    return value.expand(copies, *value.shape[1:]).clone() if len(value) == 1 else value
