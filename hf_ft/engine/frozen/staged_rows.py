"""A data set that yields the user's rows, rows of a store, or both, depending on the current stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_ft.data.rows import read_rows
from hf_ft.engine.frozen.row_store import Columns, RowStore


class StoredRow(int):
    """The index of a row in a store."""


@dataclass
class BothRows:
    """A user's row, and the index of its recorded columns in a store."""

    row: Any
    place: int


class StagedRows(torch.utils.data.Dataset):
    """The user's rows or, while a store is active, their indices in it.

    The mode is a number in shared memory, so that worker processes of a data loader see changes. A worker started
    before a store was created does not have it and continues with the user's rows.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.store: RowStore | None = None
        self._beside = False
        self._active = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def activate(self, store: RowStore | None, beside: bool = False) -> None:
        """From now on yield indices into this store, alone or along with the user's rows; for None, the rows only."""
        self.store, self._beside = store, beside
        self._active.fill_(store.number if store is not None else 0)

    @property
    def beside(self) -> bool:
        """Whether store indices currently accompany the user's rows."""
        return self.stored and self._beside

    @property
    def recorded(self) -> bool:
        """Whether there are store indices alone, and the user's rows are not read."""
        return self.stored and not self._beside

    @property
    def stored(self) -> bool:
        return self.store is not None and self.store.number == int(self._active)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        if self.recorded:
            return [StoredRow(row) for row in rows]
        user_rows = read_rows(self.dataset, rows)
        return [BothRows(row, place) for row, place in zip(user_rows, rows, strict=True)] if self.stored else user_rows


@dataclass
class StagedCollator:
    """The user's collator; store indices become a batch of the store, or extra columns of the user's batch."""

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
