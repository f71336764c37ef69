"""Endless batch streams that are split among ranks and can start at any position.

A batch of a map-style data set is a function of its number: its rows, in an order that differs in every pass, and the
random numbers that augmentation draws from Python's, NumPy's and torch's generators on reading. Wherever a run is
interrupted, and whatever workers have prefetched, the same batches follow. An iterable data set is read from the
beginning of a pass; samples consumed before are read again and skipped.
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

Position = tuple[int, int]  # completed passes, and samples of the current one: of all ranks, or of this one if iterable
Batch = dict[str, Any]
BUFFER = 1000  # shuffle buffer of a streaming data set, in samples


@dataclass(frozen=True)
class Share:
    """The share of a stream that one process reads.

    Attributes:
        size: batch size of this process.
        seed: seed of the order.
        rank: index of this process.
        ranks: number of processes.
    """

    size: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1


class Shuffled(Dataset):
    """Batches of a map-style data set by number; batch k over all ranks consists of samples k n ... (k + 1) n - 1.

    Samples are drawn from consecutive permutations, so that all batches are full.

    Args:
        dataset: has a length and rows by index.
        collate: turns rows into a batch.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch], share: Share) -> None:
        self.dataset, self.collate, self.share = dataset, collate, share
        self._order = -1, torch.zeros(0, dtype=torch.int64)

    def __getitem__(self, number: int) -> tuple[Position, Batch]:
        share, count = self.share, len(self.dataset)
        everyone = share.size * share.ranks
        first = number * everyone + share.rank * share.size
        rows = [self._row(sample) for sample in range(first, first + share.size)]
        # A separate RNG state: draws in here do not affect others, and others do not affect them.
        with random_states_kept(seed=mixed(share.seed, number, share.rank)):
            batch = self.collate(read_rows(self.dataset, rows))
        return divmod((number + 1) * everyone, count), batch

    def _row(self, sample: int) -> int:
        passes, place = divmod(sample, len(self.dataset))
        if self._order[0] != passes:
            generator = torch.Generator().manual_seed(mixed(self.share.seed, passes))
            self._order = passes, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][place])


class Passes(IterableDataset):
    """Batches of an iterable data set, pass after pass.

    A ``datasets`` data set is reshuffled within a buffer in every pass, and split among ranks by ``datasets``; for
    any other, each rank takes every ``ranks``-th sample in order. ``datasets`` shuffles differently in a worker
    process, and prefetches its buffer: on resuming, keep ``dataloader_num_workers``, and expect random augmentation in
    its ``map`` to draw different numbers.

    Args:
        start: position to continue from.
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
            for _ in range(self.start[1]):  # already consumed
                next(samples, None)
        while True:
            with random_states_kept(seed=mixed(self.share.seed, *position, self.share.rank)):
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
    """Endless batches, each with the position after it.

    Args:
        dataset: map-style or iterable.
        collate: turns rows into a batch, in a worker process if there is one.
        share: share of the samples that this process reads.
        start: position to continue from.
        workers: prefetching processes; an iterable data set is read by at most one, which preserves its order.
        more: options of the data loader.
    """
    seeds = torch.Generator().manual_seed(share.seed)  # otherwise, a loader draws from the global RNG
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
    """Whether rows can be read by index. Torch's iterable data sets have the methods too, and may have a length."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def first_rows(dataset: Any, count: int, name: str) -> list[Any]:
    """Read a few rows without disturbing RNG states.

    Raises:
        OptionError: if there are none; the message contains the data set's name.
    """
    with random_states_kept():
        if is_map_style(dataset):
            rows = read_rows(dataset, range(min(count, len(dataset))))
        else:
            rows = list(itertools.islice(iter(dataset), count))
    if not rows:
        raise OptionError(f"{name} contains no samples: pass one that does.")
    return rows


def _dry(passes: int) -> str:
    return (
        f"source_dataset ran out: pass {passes + 1} over it yielded no samples. It must support repeated iteration (a "
        "data set, not a one-time iterator), and every process must get a part of it."
    )


def mixed(*numbers: int) -> int:
    """Derive a seed that depends on each of the numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**32)
    return seed
