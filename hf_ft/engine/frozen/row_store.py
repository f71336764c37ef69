"""Recorded activations by row, in memory or in a memory-mapped file.

A :class:`RowStore` holds, for every sample of a data set, outputs of a frozen network: its activation at a border with
the small columns that the rest of the model needs, or its reference states. :class:`StagedRows` replaces the user's
data set in a data loader: it yields the user's rows, indices into the store while one is active, or both, so that
samplers, ranks and resuming work unchanged.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ft.core.context import FrozenCache
from hf_ft.data.rows import GB
from hf_ft.engine.batch import ROW
from hf_ft.engine.frozen.row_files import RowFiles, Shared

Columns = dict[str, Tensor]
CHANNELS_LAST = torch.channels_last


class RowsDiffer(ValueError):
    """Rows that cannot be stored because they differ in shape or are too large; ``column`` is the first such column."""

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


class RowStore:
    """Columns of rows with equal shapes, (samples, ...) each.

    Args:
        samples: number of rows.
        first: a few rows, for names, shapes and dtypes.
        cache: where to store the rows, and limits.
        shared: the files, if other processes of the machine map them too and store the same rows.

    Raises:
        RowsDiffer: if it would exceed the limit or the free disk space.
    """

    _made = 0

    def __init__(
        self, samples: int, first: Mapping[str, Tensor], cache: FrozenCache, shared: Shared | None = None
    ) -> None:
        RowStore._made += 1
        self.number = RowStore._made  # identifies the batches of this store
        self.samples = samples
        self._files: RowFiles | None = None
        self.bytes = sum(samples * math.prod(c.shape[1:]) * c.element_size() for c in first.values())
        if self.bytes > cache.memory_gb * GB:
            shared = shared or Shared()
            if shared.creates:
                self._check_disk(cache)
            self._files = RowFiles(cache.folder, shared)
        # Convolutions on a CPU are up to 1.5 times faster with channels last, so this order is kept.
        self._innermost = {
            name
            for name, column in first.items()
            if column.dim() == 4 and not column.is_contiguous() and column.is_contiguous(memory_format=CHANNELS_LAST)
        }
        try:
            self.columns = {name: self._empty(name, samples, self._stored(name, c)) for name, c in first.items()}
        except OSError as error:
            raise RowsDiffer(f"a file of {self.bytes / GB:.1f} GB cannot be written: {error.strerror}") from error

    def put(self, rows: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Write rows by index.

        Raises:
            RowsDiffer: if a column's shape or dtype differs from that of the first rows.
        """
        for name, target in self.columns.items():
            column = self._stored(name, columns[name])
            if column.shape[1:] != target.shape[1:] or column.dtype != target.dtype:
                shapes = f"{tuple(column.shape[1:])} {column.dtype}, not {tuple(target.shape[1:])} {target.dtype}"
                raise RowsDiffer(f"rows of {name!r} differ: {shapes}", name)
            target[rows] = column.to(target.device)

    @property
    def in_memory(self) -> bool:
        return self._files is None

    def take(self, rows: Tensor) -> Columns:
        """Rows by index, with the indices under a key that identifies the store."""
        batch = {name: column[rows] for name, column in self.columns.items()}
        batch |= {name: batch[name].permute(0, 3, 1, 2) for name in self._innermost}
        return {**batch, f"{ROW}{self.number}": rows}

    def _stored(self, name: str, column: Tensor) -> Tensor:
        return column.permute(0, 2, 3, 1) if name in self._innermost else column

    def _check_disk(self, cache: FrozenCache) -> None:
        free = shutil.disk_usage(cache.folder or tempfile.gettempdir()).free
        if self.bytes > min(cache.disk_gb * GB, 0.9 * free):
            raise RowsDiffer(
                f"{self.bytes / GB:.1f} GB are more than memory_gb={cache.memory_gb:g} and disk_gb={cache.disk_gb:g} "
                f"allow ({free / GB:.1f} GB of disk space are free)"
            )

    def _empty(self, name: str, samples: int, like: Tensor) -> Tensor:
        shape = (samples, *like.shape[1:])
        if self._files is None or math.prod(shape) == 0:
            return torch.empty(shape, dtype=like.dtype)
        return self._files.map(name, shape, like.dtype)
