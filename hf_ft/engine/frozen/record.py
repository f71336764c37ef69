"""Record what a frozen network computes for all rows: in batches, on one process or shared by several, into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hf_ft.core.context import FrozenCache
from hf_ft.engine.frozen.row_files import Shared
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore

PASS = 64  # batch size of a recording pass; larger batches are slower on a CPU


def batches_of(samples: int, size: int = PASS, equal: bool = False) -> Iterator[list[int]]:
    """The indices of all rows in batches.

    Args:
        equal: extend the last batch backwards to the size of the others, so that it repeats some rows: kernels for few
            samples round differently, and training may amplify that.
    """
    for start in range(0, samples, size):
        end = min(start + size, samples)
        yield list(range(max(0, end - size) if equal else start, end))


def record(
    batches: Iterable[Sequence[int]], compute: Callable[[Sequence[int]], Columns]
) -> Iterator[tuple[Tensor, Columns]]:
    """The indices of each batch and their columns, for :func:`fill`."""
    for rows in batches:
        yield torch.tensor(rows), compute(rows)


def share(batches: list[list[int]], ranks: int, rank: int) -> list[list[int]]:
    """The batches that a rank computes.

    With fewer batches than ranks, a rank without a batch computes the first one, to have something to send.
    """
    return batches[rank::ranks] or batches[:1]


def record_shared(
    batches: Sequence[Sequence[int]], mine: Iterator[Columns], accelerator: Accelerator
) -> Iterator[tuple[Tensor, Columns]]:
    """Like :func:`record`, but each rank computes its :func:`share` and receives the columns of all others.

    Args:
        batches: the indices of all rows, the same on every rank.
        mine: the columns of this rank's share, in order; computed when read.

    Raises:
        RowsDiffer: if row shapes differ between ranks; raised on all ranks.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    columns: Columns = {}
    for start in range(0, len(batches), ranks):
        if start == 0 or start + rank < len(batches):
            columns = next(mine)
        shared = _exchange(accelerator, columns, len(batches[0])) if ranks > 1 else [columns]
        for rows, found in zip(batches[start : start + ranks], shared, strict=False):
            yield torch.tensor(rows), {name: column[: len(rows)].cpu() for name, column in found.items()}


def _exchange(accelerator: Accelerator, columns: Columns, size: int) -> list[Columns]:
    """The columns of every rank in this round, padded to ``size`` rows; a rank without a batch resends its last one.

    Raises:
        RowsDiffer: if row shapes differ between ranks; raised on all ranks.
    """
    padded = {}
    for name, column in columns.items():
        if column.dim() > 1:
            shapes = accelerator.gather(torch.tensor([column.shape[1:]], device=column.device))
            if bool((shapes != shapes[0]).any()):
                raise RowsDiffer(f"rows of {name!r} differ: {shapes.tolist()}", name)
        blank = column.new_zeros((size, *column.shape[1:]))
        blank[: len(column)] = column
        padded[name] = blank
    gathered = {name: accelerator.gather(column) for name, column in padded.items()}
    ranks = accelerator.num_processes
    return [{name: column[r * size : (r + 1) * size] for name, column in gathered.items()} for r in range(ranks)]


def fill(
    samples: int,
    batches: Iterable[tuple[Tensor, Columns]],
    cache: FrozenCache,
    advance: Callable[[int], object],
    accelerator: Accelerator | None = None,
) -> RowStore:
    """Build a store of all rows.

    Args:
        batches: row indices and their columns; together they cover each row.
        advance: called with the number of rows of each batch.
        accelerator: given if all ranks store the same rows in step: those of a machine share files.

    Raises:
        RowsDiffer: if the rows cannot be stored; raised on all of these ranks.
    """
    store: RowStore | None = None
    for rows, columns in batches:
        if store is None:
            given = samples, columns, cache
            store = _shared_store(*given, accelerator) if accelerator else RowStore(*given)
        store.put(rows, columns)
        advance(len(rows))
    if store is None:
        raise RowsDiffer("there are no rows")
    return store


def _shared_store(samples: int, first: Columns, cache: FrozenCache, accelerator: Accelerator) -> RowStore:
    """A store on every rank, whose files the ranks of a machine share: the first of them creates these.

    Raises:
        RowsDiffer: if there is no room on some machine; raised on all ranks.
    """
    shared = Shared(broadcast_object_list([Shared().name])[0], creates=accelerator.is_local_main_process)
    store, problem = None, None
    if shared.creates:
        try:
            store = RowStore(samples, first, cache, shared)
        except RowsDiffer as error:
            problem = error
    found = accelerator.gather(torch.tensor([problem is None], device=accelerator.device).int())  # waits for all
    if not bool(found.all()):
        raise problem or RowsDiffer("the first process of a machine has no room for them")
    return store or RowStore(samples, first, cache, shared)
