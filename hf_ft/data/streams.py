"""Endless streams of batches, shared among ranks and able to start anywhere.

A batch of a map-style data set is a function of its number: which rows it holds, in an order that is another one in
every pass, and what augmentation draws from Python's, NumPy's and torch's generators while they are read. Wherever a
run is interrupted, whatever the worker processes have read ahead, the same batches follow. An iterable data set is read
from the beginning of a pass on; what was consumed before is read again and left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_ft.data.rows import read_rows
from hf_ft.errors import OptionError
from hf_ft.models.preserve import random_states_kept

__all__ = ["Share", "open_stream"]

Position = tuple[int, int]  # passes done, and samples of the present one: of all ranks, or of this one if iterable
Batch = dict[str, Any]
BUFFER = 1000  # samples among which a streaming data set is shuffled


@dataclass(frozen=True)
class Share:
    """Which samples of a stream one process gets.

    Attributes:
        size: samples in one of its batches.
        seed: of the order.
        rank: the number of this process.
        ranks: how many there are.
    """

    size: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1


class Shuffled(Dataset):
    """Batches of a map-style data set by number; batch k of all ranks together are the samples k n ... (k + 1) n - 1.

    Those are taken from one permutation after the other, so that all batches are whole.

    Args:
        dataset: has a length and rows by number.
        collate: makes a batch of rows.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch], share: Share) -> None:
        self.dataset, self.collate, self.share = dataset, collate, share
        self._order = -1, torch.zeros(0, dtype=torch.int64)

    def __getitem__(self, number: int) -> tuple[Position, Batch]:
        share, count = self.share, len(self.dataset)
        everyone = share.size * share.ranks
        first = number * everyone + share.rank * share.size
        rows = [self._row(sample) for sample in range(first, first + share.size)]
        # Its own random state: what is drawn here changes nothing else, and nothing else changes what is drawn.
        with random_states_kept(seed=_mixed(share.seed, number, share.rank)):
            batch = self.collate(read_rows(self.dataset, rows))
        return divmod((number + 1) * everyone, count), batch

    def _row(self, sample: int) -> int:
        passes, place = divmod(sample, len(self.dataset))
        if self._order[0] != passes:
            generator = torch.Generator().manual_seed(_mixed(self.share.seed, passes))
            self._order = passes, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][place])


class Passes(IterableDataset):
    """Batches of an iterable data set, pass after pass.

    One of ``datasets`` is shuffled within a buffer, anew in every pass, and shared among ranks by it; of any other,
    each rank takes every ``ranks``-th sample, in its order. ``datasets`` shuffles otherwise in a worker process than
    without one, and fills its buffer ahead: on a resume, keep ``dataloader_num_workers``, and expect random
    augmentation in its ``map`` to draw other numbers.

    Args:
        start: the position to go on from.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Batch], share: Share, start: Position = (0, 0)
    ) -> None:
        self.collate, self.share, self.start = collate, share, start
        self._splits = isinstance(dataset, datasets.IterableDataset)
        if isinstance(dataset, datasets.IterableDataset):
            dataset = dataset.shuffle(seed=share.seed, buffer_size=BUFFER)
            dataset = split_dataset_by_node(dataset, share.rank, share.ranks) if share.ranks > 1 else dataset
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[Position, Batch]]:
        samples, position = self._samples(), self.start
        with random_states_kept():
            for _ in range(self.start[1]):  # consumed before
                next(samples, None)
        while True:
            with random_states_kept(seed=_mixed(self.share.seed, *position, self.share.rank)):
                read = list(itertools.islice(samples, self.share.size))
                batch = self.collate([row for _, row in read])
            position = read[-1][0]
            yield position, batch

    def _samples(self) -> Iterator[tuple[Position, Any]]:
        for passes in itertools.count(self.start[0]):
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(passes)
            place = 0
            for place, row in enumerate(self._mine(), 1):
                yield (passes, place), row
            if not place:
                raise OptionError(_dry(passes))

    def _mine(self) -> Iterator[Any]:
        if self._splits:
            return iter(self.dataset)
        return itertools.islice(iter(self.dataset), self.share.rank, None, self.share.ranks)


def open_stream(
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    share: Share,
    start: Position = (0, 0),
    *,
    workers: int = 0,
    pin_memory: bool = False,
    **more: Any,
) -> Iterator[tuple[Position, Batch]]:
    """Batches without end, each with the position after it.

    Args:
        dataset: map-style or iterable.
        collate: makes a batch of rows, in a worker process where there are such.
        share: which samples are this process's.
        start: the position to go on from.
        workers: processes that read ahead; an iterable data set is read by one at most, which keeps its order.
        more: for the data loader.
    """
    seeds = torch.Generator().manual_seed(share.seed)  # without one, a loader draws from the global random state
    shared: dict[str, Any] = {"batch_size": None, "pin_memory": pin_memory, "generator": seeds, **more}
    if not workers:
        shared.pop("prefetch_factor", None)
    if is_map_style(dataset):
        batches = Shuffled(dataset, collate, share)
        done = start[0] * len(dataset) + start[1]
        numbers = itertools.count(done // (share.size * share.ranks))
        return iter(DataLoader(batches, sampler=numbers, num_workers=workers, **shared))
    return iter(DataLoader(Passes(dataset, collate, share, start), num_workers=min(1, workers), **shared))


def is_map_style(dataset: Any) -> bool:
    """Whether rows can be read by number. An iterable data set of torch's has the methods, and may have a length."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def first_rows(dataset: Any, count: int, name: str) -> list[Any]:
    """Some rows to look at, random states undisturbed.

    Raises:
        OptionError: there are none, by the data set's name.
    """
    with random_states_kept():
        if is_map_style(dataset):
            rows = read_rows(dataset, range(min(count, len(dataset))))
        else:
            rows = list(itertools.islice(iter(dataset), count))
    if not rows:
        raise OptionError(f"{name} holds no sample: pass one that does.")
    return rows


def _dry(passes: int) -> str:
    return (
        f"source_dataset ran dry: pass {passes + 1} over it gave no sample. It must be possible to go over it again "
        "and again (a data set, not an iterator that is used up), and each process must get a part of it."
    )


def _mixed(*numbers: int) -> int:
    """A seed that differs with each of the numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**32)
    return seed
