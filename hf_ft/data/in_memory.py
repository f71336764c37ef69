"""Prepared samples, read once and kept in memory, for repeated training runs on the same samples.

Opening, resizing and normalising an image often takes longer than a training step on it. When a search or a comparison
trains many times on the same images without augmentation, this work is done only once.
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
from hf_ft.data.progress import bar
from hf_ft.data.rows import GB, drawn_rows, read_rows, same_each_time, spread_rows
from hf_ft.errors import DataError

logger = logging.get_logger(__name__)
READ = 64  # samples per read call
LOOKED_AT = 8  # samples that determine the total size and whether reads are deterministic
Row = Mapping[str, Any]


def held(dataset: Any, limit_gb: float = 2.0) -> Any:
    """Keep a map-style data set's samples in memory, if they fit.

    Args:
        dataset: samples as dictionaries, the same on every read.
        limit_gb: maximum memory in GB (2**30 bytes), estimated from a few samples before all are read.

    Returns:
        A :class:`Held`; or the data set itself, with a log message, if it would exceed the limit.

    Raises:
        DataError: if samples differ between reads, or if the limit is negative.
    """
    if not limit_gb >= 0:
        raise DataError(f"held: limit_gb={limit_gb} must be 0 or more.")
    some = drawn_rows(len(dataset), LOOKED_AT)
    if some and not same_each_time(lambda: _flat(read_rows(dataset, some)), times=2):
        raise DataError(
            "held: samples differ each time they are read, so keeping one version would change the training: prepare "
            "the data with augment='none'."
        )
    needed = estimated_bytes(dataset)
    if needed > limit_gb * GB:
        logger.warning(
            f"{len(dataset):,} samples would take {needed / GB:.2f} GB of memory, more than limit_gb={limit_gb:g}, "
            "so they are read again every time."
        )
        return dataset
    return Held(dataset)


def estimated_bytes(dataset: Any) -> int:
    """Estimate the memory of all samples from the mean of a few."""
    spread = spread_rows(len(dataset), LOOKED_AT)
    if not spread:
        return 0
    sizes = [_bytes(value) for row in read_rows(dataset, spread) for value in row.values()]
    return sum(sizes) * len(dataset) // len(spread)


class Held(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of a map-style data set, read once and kept in memory, bit-identical to those of the data set.

    A column of tensors with equal shapes and dtypes is stored as one tensor (n, ...). Other columns, such as token
    lists of texts, are stored as lists. Several pixel columns, as created by a processor for several models, are
    stored in the same way.

    Args:
        dataset: samples as dictionaries, all with the same keys.

    Attributes:
        columns: all samples, by column name.
        features: features of the data set, if it has any; class names are read from them.

    Raises:
        DataError: if a sample is not a dictionary, or if its keys differ from those of the first.
    """

    def __init__(self, dataset: Any) -> None:
        self.features = getattr(dataset, "features", None)
        self._count = len(dataset)
        self.columns: dict[str, Tensor | list[Any]] = {}
        with bar("reading samples", self._count, unit=" samples") as shown:
            for start in range(0, self._count, READ):
                rows = read_rows(dataset, range(start, min(start + READ, self._count)))
                self._put(start, rows)
                shown.update(len(rows))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -self._count <= row < self._count:
            raise IndexError(f"sample {row} of {self._count}")
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Read samples by index in one call. They are copies: modifying them does not change the stored samples."""
        rows = [int(row) for row in rows]
        columns = {
            name: list(kept[rows]) if isinstance(kept, Tensor) else [_copied(kept[row]) for row in rows]
            for name, kept in self.columns.items()
        }
        return [{name: values[place] for name, values in columns.items()} for place in range(len(rows))]

    @property
    def class_labels(self) -> np.ndarray | None:
        """The class number of each sample, (n,); None if labels are of another kind."""
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
                raise DataError(
                    f"held: sample {place} has the keys {sorted(row)}, but the first has {sorted(self.columns)}."
                )
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
    """Copy a value that can be modified in place."""
    if isinstance(value, Tensor):
        return value.clone()  # in its own storage, if it was a view of a batch
    return value.copy() if isinstance(value, list | np.ndarray) else value


def _flat(rows: Iterable[Row]) -> dict[str, Any]:
    """All values of some samples, under unique keys."""
    values = {f"{place}.{name}": value for place, row in enumerate(rows) for name, value in row.items()}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(_bytes, value))
    return sys.getsizeof(value)
