"""Batches of the training data, independent of where a run is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_ft.data.augment import drawn_for
from hf_ft.data.mixing import Mixing
from hf_ft.data.rows import drawn_rows, read_rows, same_each_time
from hf_ft.data.streams import mixed
from hf_ft.engine.batch import second_view_columns
from hf_ft.engine.frozen.staged_rows import StagedRows
from hf_ft.models.preserve import random_states_kept

CHECKED = 8  # rows that are read several times to see whether they differ


class TrainingBatches:
    """Reads and collates rows, given their indices; the collator of a loader over these.

    The random numbers that augmentation draws for a batch from Python's, NumPy's and torch's generators depend only on
    the seed, the epoch and the batch's rows; those that ``hf_ft.data`` draws for an image, on the image instead of the
    rows. If they were drawn from the states in a checkpoint, they would differ from those of an uninterrupted run: when
    the checkpoint is saved, the next batch has already been read.

    Args:
        dataset: rows by index.
        collate: turns rows into a batch.
        seed: seed of the augmentation.
        epoch: number of the epoch, in memory that worker processes share.
        twice: whether a batch also holds its rows as read with other random numbers, if these make a difference.
        mixing: mixes the images and labels of each batch.
        classes: number of classes, for labels that are classes; as for :class:`~hf_ft.data.mixing.Mixing`.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        seed: int,
        epoch: Tensor,
        twice: bool = False,
        mixing: Mixing | None = None,
        classes: int | None = None,
    ) -> None:
        self.dataset, self.collate, self.seed, self.epoch = dataset, collate, seed, epoch
        self.twice = twice and not same_each_time(lambda: self._read(drawn_rows(len(dataset), CHECKED)))
        self.mixing, self.classes = mixing, classes

    def __call__(self, rows: Sequence[int]) -> Any:
        if isinstance(self.dataset, StagedRows) and self.dataset.recorded:  # setting states takes 0.1 ms
            return self._read(rows)
        batch = self._drawn(rows)
        if self.twice:
            batch = {**batch, **second_view_columns(self._drawn(rows, 1))}
        return self.mixing(batch, self.classes, mixed(*self._of_epoch(), *rows)) if self.mixing else batch

    def _of_epoch(self, *again: int) -> tuple[int, ...]:
        return self.seed, int(self.epoch), *again

    def _drawn(self, rows: Sequence[int], *again: int) -> Any:
        drawn = self._of_epoch(*again)
        with drawn_for(mixed(*drawn)), random_states_kept(mixed(*drawn, *rows)):
            return self._read(rows)

    def _read(self, rows: Sequence[int]) -> Any:
        return self.collate(read_rows(self.dataset, rows))


class EpochOrder(Sampler[int]):
    """The order of a sampler that draws from torch's global generator, which then depends only on seed and epoch.

    If it depended on the global state, it would differ after a resume within an epoch, and possibly between processes.

    Args:
        sampler: draws an order whenever it is iterated.
        seed: seed of all orders.
        epoch: number of the epoch, in memory that is updated.
    """

    def __init__(self, sampler: Sampler[int], seed: int, epoch: Tensor) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        with random_states_kept(mixed(self.seed, int(self.epoch))):
            return iter(list(self.sampler))


def ordered_by_epoch(sampler: Any, seed: int, epoch: Tensor) -> Any:
    """The sampler, or its :class:`EpochOrder` if it groups by length, for which Trainer uses the global generator."""
    by_length = isinstance(sampler, LengthGroupedSampler) and sampler.generator is None
    return EpochOrder(sampler, seed, epoch) if by_length else sampler


class StreamedBatches:
    """Collates the rows of a stream; random numbers depend only on the seed and on the numbers of the batch.

    Args:
        collate, seed, mixing, classes: see :class:`TrainingBatches`.
        twice: whether a batch also holds its rows as collated with other random numbers.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        seed: int,
        twice: bool = False,
        mixing: Mixing | None = None,
        classes: int | None = None,
    ) -> None:
        self.collate, self.seed, self.twice, self.mixing, self.classes = collate, seed, twice, mixing, classes

    def __call__(self, rows: list[Any], passes: int, *numbers: int) -> Any:
        batch = self._drawn(rows, passes, *numbers)
        if self.twice:
            batch = {**batch, **second_view_columns(self._drawn(rows, passes, *numbers, 1))}
        return self.mixing(batch, self.classes, mixed(self.seed, passes, *numbers)) if self.mixing else batch

    def _drawn(self, rows: list[Any], passes: int, *numbers: int) -> Any:
        again = numbers[4:]
        with (
            drawn_for(mixed(self.seed, passes, *again)),
            random_states_kept(mixed(self.seed, passes, *numbers)),
        ):
            return self.collate(rows)
