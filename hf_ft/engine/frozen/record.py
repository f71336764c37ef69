"""Fill a row store from batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from hf_ft.core.context import FrozenCache
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore


def fill(
    samples: int, batches: Iterable[tuple[Tensor, Columns]], cache: FrozenCache, advance: Callable[[int], None]
) -> RowStore:
    """Build a store of all rows.

    Args:
        batches: row indices and their columns; together they cover each row once.
        advance: called with the number of rows of each batch.

    Raises:
        RowsDiffer: if the rows cannot be stored.
    """
    store: RowStore | None = None
    for rows, columns in batches:
        store = store or RowStore(samples, columns, cache)
        store.put(rows, columns)
        advance(len(rows))
    if store is None:
        raise RowsDiffer("there are no rows")
    return store
