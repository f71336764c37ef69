"""Rows of recorded activations, in memory or in a file mapped into it, and a data set that deals them out.

A :class:`RowStore` holds, for every sample of a data set, what a frozen network computes from it: its activation at
a border, with the small columns that the rest of the model needs, or its reference states. :class:`StagedRows` stands
in for the user's data set in a data loader: it yields the user's rows, places in the store while one is active, or
both, so that samplers, ranks and resuming see no difference.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ft.core.context import FrozenCache
from hf_ft.data.rows import GB, read_rows
from hf_ft.engine.batch import ROW

Columns = dict[str, Tensor]
CHANNELS_LAST = torch.channels_last


class RowsDiffer(ValueError):
    """Rows that differ in shape or are too large: they cannot be kept. ``column`` is the name of the first."""

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


class RowStore:
    """Columns of equal rows, (samples, ...) each.

    Args:
        samples: number of rows.
        first: some rows, for names, shapes and types.
        cache: where it may lie.

    Raises:
        RowsDiffer: it would be larger than allowed, or than the disk has room.
    """

    _made = 0

    def __init__(self, samples: int, first: Mapping[str, Tensor], cache: FrozenCache) -> None:
        RowStore._made += 1
        self.number = RowStore._made  # tells batches of this store from those of another
        self.samples = samples
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.bytes = sum(samples * math.prod(c.shape[1:]) * c.element_size() for c in first.values())
        if self.bytes > cache.memory_gb * GB:
            self._check_disk(cache)
            self._folder = tempfile.TemporaryDirectory(prefix="hf_ft_frozen_", dir=cache.folder)
        # Convolutions on a CPU are up to 1.5 times faster with channels innermost: that order is kept.
        self._innermost = {
            name
            for name, column in first.items()
            if column.dim() == 4 and not column.is_contiguous() and column.is_contiguous(memory_format=CHANNELS_LAST)
        }
        self.columns = {name: self._empty(name, samples, self._stored(name, c)) for name, c in first.items()}

    def put(self, rows: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Write rows, by number.

        Raises:
            RowsDiffer: a column has another shape or type than in the first rows.
        """
        for name, kept in self.columns.items():
            column = self._stored(name, columns[name])
            if column.shape[1:] != kept.shape[1:] or column.dtype != kept.dtype:
                shapes = f"{tuple(column.shape[1:])} {column.dtype}, not {tuple(kept.shape[1:])} {kept.dtype}"
                raise RowsDiffer(f"rows of {name!r} differ: {shapes}", name)
            kept[rows] = column.to(kept.device)

    @property
    def in_memory(self) -> bool:
        return self._folder is None

    def take(self, rows: Tensor) -> Columns:
        """Rows by number, and these numbers under a name that tells the store."""
        taken = {name: column[rows] for name, column in self.columns.items()}
        taken |= {name: taken[name].permute(0, 3, 1, 2) for name in self._innermost}
        return {**taken, f"{ROW}{self.number}": rows}

    def _stored(self, name: str, column: Tensor) -> Tensor:
        return column.permute(0, 2, 3, 1) if name in self._innermost else column

    def _check_disk(self, cache: FrozenCache) -> None:
        free = shutil.disk_usage(cache.folder or tempfile.gettempdir()).free
        if self.bytes > min(cache.disk_gb * GB, 0.9 * free):
            raise RowsDiffer(
                f"{self.bytes / GB:.1f} GB are more than memory_gb={cache.memory_gb:g} and "
                f"disk_gb={cache.disk_gb:g} allow ({free / GB:.1f} GB of disk are free)"
            )

    def _empty(self, name: str, samples: int, like: Tensor) -> Tensor:
        shape = (samples, *like.shape[1:])
        size = math.prod(shape)
        if self._folder is None or size == 0:
            return torch.empty(shape, dtype=like.dtype)
        file = str(Path(self._folder.name) / name)
        return torch.from_file(file, shared=True, size=size, dtype=like.dtype).reshape(shape)


class StoredRow(int):
    """The place of a row in a store."""


@dataclass
class BothRows:
    """The user's row, and its place in a store of what comes beside it."""

    row: Any
    place: int


class StagedRows(torch.utils.data.Dataset):
    """The user's rows, or, while a store is active, their places in it.

    Which of the two is one number in shared memory, so that worker processes of a data loader see it change.
    A worker that was started before a store was made does not have it, and goes on with the user's rows.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.store: RowStore | None = None
        self._beside = False
        self._active = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def activate(self, store: RowStore | None, beside: bool = False) -> None:
        """Deal out places in this store from now on, alone or beside the user's rows; None for these alone."""
        self.store, self._beside = store, beside
        self._active.fill_(store.number if store is not None else 0)

    @property
    def beside(self) -> bool:
        """Whether places in a store come beside the user's rows at present."""
        return self.stored and self._beside

    @property
    def stored(self) -> bool:
        return self.store is not None and self.store.number == int(self._active)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        if self.stored and not self._beside:
            return [StoredRow(row) for row in rows]
        found = read_rows(self.dataset, rows)
        return [BothRows(row, place) for row, place in zip(found, rows, strict=True)] if self.stored else found


@dataclass
class StagedCollator:
    """The user's collator; places in a store become a batch of it, or columns beside the user's."""

    collate: Callable[[list[Any]], Any]
    rows: StagedRows

    def __call__(self, rows: list[Any]) -> Any:
        if isinstance(rows[0], StoredRow):
            return self._taken([int(row) for row in rows])
        if isinstance(rows[0], BothRows):
            return {**self.collate([both.row for both in rows]), **self._taken([both.place for both in rows])}
        return self.collate(rows)

    def _taken(self, places: list[int]) -> Columns:
        assert self.rows.store is not None
        return self.rows.store.take(torch.tensor(places, dtype=torch.int64))


def fill(
    samples: int, batches: Iterable[tuple[Tensor, Columns]], cache: FrozenCache, advance: Callable[[int], None]
) -> RowStore:
    """A store of all rows.

    Args:
        batches: numbers of rows, and their columns; all together each row once.
        advance: told how many rows each batch held.

    Raises:
        RowsDiffer: the rows cannot be kept.
    """
    store: RowStore | None = None
    for rows, columns in batches:
        store = store or RowStore(samples, columns, cache)
        store.put(rows, columns)
        advance(len(rows))
    if store is None:
        raise RowsDiffer("there are no rows")
    return store
