"""Prepared samples read once and kept in memory, for trainings that go over the same samples again and again.

Opening, resizing and normalising an image often takes longer than a training step on it. Where a search or a
comparison trains many times on the same images without augmentation, that work is done once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from hf_ft.data.labels import LABEL_COLUMNS
from hf_ft.data.rows import GB, read_rows, same_each_time
from hf_ft.errors import DataError

logger = logging.get_logger(__name__)
READ = 64  # samples read in one call
LOOKED_AT = 8  # samples that tell the size of all, and whether they are the same each time they are read
Row = Mapping[str, Any]


def held(dataset: Any, limit_gb: float = 2.0) -> Any:
    """Keep a map-style data set's samples in memory, if they fit.

    Args:
        dataset: samples as dictionaries, the same each time they are read.
        limit_gb: GB (2**30 bytes) that they may take, estimated from a few samples before all are read.

    Returns:
        A :class:`Held`; or the data set itself, and a logged sentence, where it would take more.

    Raises:
        DataError: samples differ from one reading to the next, or a limit below 0.
    """
    if not limit_gb >= 0:
        raise DataError(f"held: limit_gb={limit_gb} must be 0 or more.")
    spread = _spread(len(dataset))
    if spread and not same_each_time(lambda: _flat(read_rows(dataset, spread)), times=2):
        raise DataError(
            "held: samples differ from one reading to the next, so that keeping one of them would change the training: "
            "prepare the data with augment='none'."
        )
    needed = estimated_bytes(dataset)
    if needed > limit_gb * GB:
        logger.warning(
            f"{len(dataset):,} samples would take {needed / GB:.2f} GB of memory, more than limit_gb={limit_gb:g}: "
            "they are read anew each time."
        )
        return dataset
    return Held(dataset)


def estimated_bytes(dataset: Any) -> int:
    """What all samples will take in memory, from the mean of a few."""
    spread = _spread(len(dataset))
    if not spread:
        return 0
    sizes = [_bytes(value) for row in read_rows(dataset, spread) for value in row.values()]
    return sum(sizes) * len(dataset) // len(spread)


class Held(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of a map-style data set, read once and kept in memory; each as the data set gives it, bit for bit.

    A column of tensors of one shape and type is one tensor (n, ...). Others, such as the token lists of texts, are
    lists. Several pixel columns, as a processor for several models makes them, are kept like one.

    Args:
        dataset: samples as dictionaries, all with the same keys.

    Attributes:
        columns: all samples, by the name of the column.
        features: those of the data set where it has some: the names of its classes are read from them.

    Raises:
        DataError: a sample that is no dictionary, or has other keys than the first.
    """

    def __init__(self, dataset: Any) -> None:
        self.features = getattr(dataset, "features", None)
        self._count = len(dataset)
        self.columns: dict[str, Tensor | list[Any]] = {}
        for start in range(0, self._count, READ):
            rows = read_rows(dataset, range(start, min(start + READ, self._count)))
            self._put(start, rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -self._count <= row < self._count:
            raise IndexError(f"sample {row} of {self._count}")
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by number, in one call. They are copies: what is done to them changes none that is kept."""
        rows = [int(row) for row in rows]
        taken = {
            name: list(kept[rows]) if isinstance(kept, Tensor) else [_copied(kept[row]) for row in rows]
            for name, kept in self.columns.items()
        }
        return [{name: values[place] for name, values in taken.items()} for place in range(len(rows))]

    @property
    def class_labels(self) -> np.ndarray | None:
        """The class number of each sample, (n,); None where labels are something else."""
        name = next((name for name in LABEL_COLUMNS if name in self.columns), None)
        if name is None:
            return None
        kept = self.columns[name]
        if any(isinstance(value, list) for value in kept):
            return None
        labels = kept.numpy() if isinstance(kept, Tensor) else np.asarray(kept)
        return labels if labels.ndim == 1 and labels.dtype.kind in "iu" else None

    def _put(self, start: int, rows: Sequence[Row]) -> None:
        for place, row in enumerate(rows, start):
            if not isinstance(row, Mapping):
                raise DataError(f"held: sample {place} is a {type(row).__name__}, not a dictionary of columns.")
            if start + place == 0:
                self.columns = {name: self._empty(value) for name, value in row.items()}
            if set(row) != set(self.columns):
                raise DataError(f"held: sample {place} has the keys {sorted(row)}, the first {sorted(self.columns)}.")
        for name in self.columns:
            self._put_column(name, start, [row[name] for row in rows])

    def _empty(self, first: Any) -> Tensor | list[Any]:
        return first.new_empty((self._count, *first.shape)) if isinstance(first, Tensor) else []

    def _put_column(self, name: str, start: int, values: list[Any]) -> None:
        kept = self.columns[name]
        if isinstance(kept, Tensor):
            if all(_like(value, kept) for value in values):
                torch.stack(values, out=kept[start : start + len(values)])
                return
            kept = self.columns[name] = [value.clone() for value in kept[:start]]
        kept += [_copied(value) for value in values]


def _like(value: Any, kept: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == kept.shape[1:] and value.dtype == kept.dtype


def _copied(value: Any) -> Any:
    """A copy where a value can be changed in place."""
    if isinstance(value, Tensor):
        return value.clone()  # of its own size, where it was a part of a batch
    return value.copy() if isinstance(value, list | np.ndarray) else value


def _spread(count: int) -> list[int]:
    return list(range(0, count, max(1, count // LOOKED_AT)))[:LOOKED_AT]


def _flat(rows: Iterable[Row]) -> dict[str, Any]:
    """All values of some samples, under names of their own."""
    values = {f"{place}.{name}": value for place, row in enumerate(rows) for name, value in row.items()}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(_bytes, value))
    return sys.getsizeof(value)
