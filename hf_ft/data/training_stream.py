"""Endless batches of streamed training data, split among ranks and worker processes, starting at any position.

Samples come in the order of the data set, or shuffled in blocks of consecutive samples, in an order that differs in
every pass. Unlike with a shuffle buffer of ``datasets``, whose content is lost on resuming, the samples after a
position follow from the position: at most one block is read again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from hf_ft.data.streams import Share, mixed
from hf_ft.errors import OptionError
from hf_ft.models.preserve import random_states_kept

logger = logging.get_logger(__name__)
# https://github.com/huggingface/datasets/issues/8145: a table is read ahead, and what is left of it is skipped.
FORGETFUL = tuple(map(int, datasets.__version__.split(".")[:3])) < (5, 0, 1)
Batch = dict[str, Any]
Form = Callable[..., Batch]


@dataclass(frozen=True)
class Place:
    """Where one reader of a stream continues.

    Attributes:
        passes: completed passes over its part of the data.
        start: samples of the current pass before the current block.
        taken: samples taken of this block.
        state: the data set's own state at its beginning; None if it has none that can be relied on.
    """

    passes: int = 0
    start: int = 0
    taken: int = 0
    state: Any = None


@dataclass(frozen=True)
class Position:
    """Where a rank continues: the number of batches so far, and the place of each of its readers, which take turns."""

    batches: int = 0
    places: tuple[Place, ...] = (Place(),)

    def after(self, reader: int, place: Place) -> Position:
        """The position after a batch of this reader."""
        places = (*self.places[:reader], place, *self.places[reader + 1 :])
        return replace(self, batches=self.batches + 1, places=places)


class Reader(IterableDataset):
    """Full batches of one rank, pass after pass: (reader, place after it, batch).

    A ``datasets`` stream is split among ranks and workers by ``datasets``; of any other, each rank takes every
    ``ranks``-th sample.

    Args:
        dataset: iterable; read from the beginning of a pass with every ``iter()``.
        form: turns rows into a batch, given numbers that identify it.
        block: samples that are shuffled at a time; 0 for the order of the data set.
    """

    def __init__(self, dataset: Any, form: Form, share: Share, block: int, position: Position) -> None:
        self.form, self.share, self.shuffled, self.position = form, share, block > 1, position
        self.block = block if self.shuffled else share.size
        self.whole = self.dataset = dataset
        self._split = isinstance(dataset, datasets.IterableDataset)
        self._resumable = keeps_place(dataset) and (self._split or share.ranks == 1)

    def __iter__(self) -> Iterator[tuple[int, Place, Batch] | None]:
        if isinstance(self.whole, datasets.IterableDataset):
            # Even for a single rank: epoch and place are set in this copy, which no other process shares.
            self.dataset = split_dataset_by_node(self.whole, self.share.rank, self.share.ranks)
        worker = get_worker_info()
        reader = 0 if worker is None else worker.id
        if reader < self.position.batches % len(self.position.places):
            yield None  # this reader has had its turn
        place = self.position.places[reader]
        samples = self._samples(place, reader)
        while True:
            numbers = place.passes, place.start, place.taken, self.share.rank, reader
            read = list(itertools.islice(samples, self.share.size))
            place = read[-1][0]
            yield reader, place, self.form([row for _, row in read], *numbers)

    def _samples(self, place: Place, reader: int) -> Iterator[tuple[Place, Any]]:
        """Each sample with the place after it."""
        for passes in itertools.count(place.passes):
            rows = self._pass(place)
            while block := self._block(rows, place, reader):
                state = self._state()
                order = self._order(len(block), place, reader)
                for taken in range(place.taken, len(block)):
                    yield replace(place, taken=taken + 1), block[order[taken]]
                place = replace(place, start=place.start + len(block), taken=0, state=state)
            if not place.start:
                raise OptionError(_dry(passes))
            place = Place(passes + 1)

    def _pass(self, place: Place) -> Iterator[Any]:
        """The rows of a pass from the beginning of a block on."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(place.passes)
        if place.state is not None:
            self.dataset.load_state_dict(place.state)
            return iter(self.dataset)
        rows = iter(self.dataset)
        if not self._split:
            rows = itertools.islice(rows, self.share.rank, None, self.share.ranks)
        if place.start:
            logger.warning(f"train_dataset keeps no position: {place.start:,} samples are read again and skipped.")
        with random_states_kept():
            for _ in itertools.islice(rows, place.start):
                pass
        return rows

    def _block(self, rows: Iterator[Any], place: Place, reader: int) -> list[Any]:
        with random_states_kept(self._seed(place, reader, 1)):
            return list(itertools.islice(rows, self.block))

    def _order(self, count: int, place: Place, reader: int) -> Sequence[int]:
        if not self.shuffled:
            return range(count)
        generator = torch.Generator().manual_seed(self._seed(place, reader, 2))
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _seed(self, place: Place, reader: int, use: int) -> int:
        return mixed(self.share.seed, place.passes, place.start, self.share.rank, reader, use)

    def _state(self) -> Any:
        return self.dataset.state_dict() if self._resumable else None


def open_training_stream(
    dataset: Any, form: Form, share: Share, block: int, position: Position, *, workers: int = 0, **more: Any
) -> Iterator[tuple[Position, Batch]]:
    """Endless batches, each with the position after it.

    Args:
        dataset: iterable, with at least one sample for every reader; see :class:`Reader`.
        position: the position, with as many readers as :func:`readers_of` returns.
        workers: prefetching processes; there may be fewer readers.
        more: options of the data loader.
    """
    if not workers:
        more.pop("prefetch_factor", None)
    loader = DataLoader(
        Reader(dataset, form, share, block, position),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=len(position.places) if workers else 0,
        generator=torch.Generator().manual_seed(share.seed),  # otherwise it draws from the global random state
        **more,
    )
    for read in loader:
        if read is not None:
            reader, place, batch = read
            position = position.after(reader, place)
            yield position, batch


def readers_of(dataset: Any, ranks: int, workers: int) -> int:
    """The number of readers of each rank: worker processes that get a part of the data each.

    Only a ``datasets`` stream can be split among them, by shards. From any other, at most one process prefetches.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return 1
    shards = int(dataset.num_shards)
    return max(1, min(workers, shards // ranks if shards % ranks == 0 else shards))


def keeps_place(dataset: Any) -> bool:
    """Whether a stream's ``state_dict`` determines what follows, so that nothing has to be read again.

    That of ``datasets`` does, unless there is a shuffle buffer, whose content is not in it, or a batched function on
    tables, after which it may skip a batch; in versions before 5.0.1, after any function (``map``, ``filter``).
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    inner = getattr(dataset, "_ex_iterable", None)
    return inner is not None and all(map(_tells, _parts(inner)))


def _parts(iterable: Any) -> Iterator[Any]:
    yield iterable
    for inner in (getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", ())):
        if inner is not None:
            yield from _parts(inner)


def _tells(part: Any) -> bool:
    formatting = getattr(part, "formatting", None)
    tables = getattr(part, "batched", False) and formatting is not None and formatting.is_table
    return getattr(part, "buffer_size", 1) <= 1 and not tables and not (FORGETFUL and hasattr(part, "function"))


def _as_it_is(batch: Any) -> Any:
    return batch


def _dry(passes: int) -> str:
    return (
        f"train_dataset ran out: pass {passes + 1} over it yielded no samples. It must support repeated iteration (a "
        "data set, not a one-time iterator), and every process must get a part of it; or set a smaller max_steps."
    )
