"""Batches of the training data, the same wherever a run is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from hf_ft.data.augment import drawn_for
from hf_ft.data.mixing import Mixing
from hf_ft.data.rows import read_rows
from hf_ft.data.streams import mixed
from hf_ft.engine.frozen.staged_rows import StagedRows
from hf_ft.models.preserve import random_states_kept


class TrainingBatches:
    """Reads and collates rows, given their indices; the collator of a loader over these.

    The random numbers that augmentation draws for a batch from Python's, NumPy's and torch's generators depend on the
    seed, the epoch and its rows alone; those that ``hf_ft.data`` draws for an image, on that image instead of the rows.
    Drawn from the states that a checkpoint holds, they would not be those of an uninterrupted run: when it is saved,
    the next batch has already been read.

    Args:
        dataset: rows by index.
        collate: turns rows into a batch.
        seed: seed of the augmentation.
        epoch: number of the epoch, in memory that worker processes share.
        mixing: mixes the images and labels of each batch.
        classes: number of classes, for labels that are classes; as for :class:`~hf_ft.data.mixing.Mixing`.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        seed: int,
        epoch: Tensor,
        mixing: Mixing | None = None,
        classes: int | None = None,
    ) -> None:
        self.dataset, self.collate, self.seed, self.epoch = dataset, collate, seed, epoch
        self.mixing, self.classes = mixing, classes

    def __call__(self, rows: Sequence[int]) -> Any:
        drawn = not (isinstance(self.dataset, StagedRows) and self.dataset.recorded)  # setting states takes 0.1 ms
        epoch = mixed(self.seed, int(self.epoch))
        of_batch = mixed(self.seed, int(self.epoch), *rows)
        with drawn_for(epoch), random_states_kept(of_batch) if drawn else nullcontext():
            batch = self.collate(read_rows(self.dataset, rows))
        return self.mixing(batch, self.classes, of_batch) if self.mixing else batch
