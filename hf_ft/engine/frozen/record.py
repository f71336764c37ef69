"""Fill a row store from batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from hf_ft.core.context import FrozenCache
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore


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
