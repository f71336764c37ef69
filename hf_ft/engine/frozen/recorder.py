"""Activations of a data set at any border of a model, recorded for searches that train the model many times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.core.context import FrozenCache, Samples
from hf_ft.data.rows import GB, drawn_rows, same_each_time
from hf_ft.engine.batch import ACTIVATION
from hf_ft.engine.frozen.find_prefix import PrefixFinder
from hf_ft.engine.frozen.freezing import Liveness
from hf_ft.engine.frozen.prefix import FrozenPrefix
from hf_ft.engine.frozen.record import batches_of, record
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore
from hf_ft.engine.objective import Objective
from hf_ft.models.feature_hooks import activations
from hf_ft.models.parts import Chain
from hf_ft.models.preserve import random_states_kept

logger = logging.get_logger(__name__)
VALUES = "values"  # the only column of a store
COLUMN = "column:"  # prefix of a batch column's key, to distinguish it from a border


@dataclass(frozen=True)
class RecordedRows:
    """All samples at the borders of one prefix: activations and the batch columns it needs, each in its own store."""

    stores: Mapping[str, RowStore]  # by batch column

    def take(self, rows: Tensor) -> Columns:
        """Rows by index."""
        return {name: store.take(rows)[VALUES] for name, store in self.stores.items()}


class Recordings:
    """Activations of all samples at the borders of a model's frozen prefixes, each computed only once.

    A pass records as many of the planned borders as the cache has room for, in the order in which they were planned.

    Args:
        model: model with the weights of the prefixes; never changed.
        samples: recorded if they are the same on every read.
        cache: whether to store activations, and cache limits.
        computing: context manager for the model's computations, such as autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        cache: FrozenCache,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.samples, self.cache, self._computing = model, samples, cache, computing
        self._prefixes: dict[tuple[Chain, ...], FrozenPrefix | None] = {}
        self._stores: dict[str, RowStore] = {}  # by border, and by batch column
        self._planned: dict[str, None] = {}
        self._finder: PrefixFinder | None = None
        self.passes = 0
        some = drawn_rows(samples.count, 8)
        usable = samples.count >= 4 and cache.use != "never"
        self.usable = usable and (cache.use == "always" or same_each_time(lambda: samples.read(some)))

    def prefix(self, objective: Objective) -> FrozenPrefix | None:
        """The prefix that can be skipped in the current stage of a copy of the model, possibly with adapters."""
        return None if objective.wants_inputs else self.prefix_of(objective.model, objective.alive)

    def prefix_of(self, model: nn.Module, alive: Liveness) -> FrozenPrefix | None:
        """The prefix that can be skipped in the model or a copy of it, given its live part."""
        if not self.usable or not alive.has_prefix:
            return None
        # Copies differ only after the prefix.
        key = tuple(Chain(chain.name, chain.parts[:1]) for chain in alive.chains)
        if key not in self._prefixes:
            with random_states_kept(), self._computing():
                finder = self._finder_of(model)
                prefix = None if finder is None else finder.find(alive.chains)
            # Not bound to the copy it was found on, which would stay in memory.
            self._prefixes[key] = None if prefix is None else dataclasses.replace(prefix, model=self.model)
        prefix = self._prefixes[key]
        return None if prefix is None else dataclasses.replace(prefix, model=model)

    def _finder_of(self, model: nn.Module) -> PrefixFinder | None:
        """One finder for the model and all its copies; a copy with adapters has other modules and its own finder."""
        small = self.samples.read([0, 1]), self.samples.read([0, 2, 3])
        if [name for name, _ in model.named_modules()] != [name for name, _ in self.model.named_modules()]:
            return PrefixFinder.of(model, *small)
        if self._finder is None:
            self._finder = PrefixFinder.of(self.model, *small)
        return self._finder

    def plan(self, prefix: FrozenPrefix) -> None:
        """Request these borders in advance: the next pass also records them if there is room."""
        self._planned |= dict.fromkeys(map(self._plain, prefix.borders))

    def store(self, prefix: FrozenPrefix) -> RecordedRows | None:
        """All samples at a prefix's borders.

        Returns:
            None if they cannot be stored; the reason is logged.
        """
        borders = {f"{ACTIVATION}{place}": self._plain(border) for place, border in enumerate(prefix.borders)}
        columns = {**borders, **{name: f"{COLUMN}{name}" for name in prefix.kept}}
        try:
            if any(key not in self._stores for key in columns.values()):
                self._fill(list(columns.values()))
        except RowsDiffer as error:
            logger.warning_once(f"The frozen part of the model is computed in every step: {error}.")
            self.usable = error.column is None and self.usable  # otherwise rows differ in shape at any border
            return None
        return RecordedRows({name: self._stores[key] for name, key in columns.items()})

    def _fill(self, needed: Sequence[str]) -> None:
        """Record the needed borders, and as many of the planned ones as there is room for."""
        more = [border for border in self._planned if border not in self._stores and border not in needed]
        missing = [key for key in needed if key not in self._stores]
        first = self._compute([*missing, *more], [0])
        room = (self.cache.memory_gb + self.cache.disk_gb) * GB
        size = {key: self.samples.count * math.prod(v.shape[1:]) * v.element_size() for key, v in first.items()}
        if self._used() + sum(size[key] for key in missing) > room:
            self._stores = {key: store for key, store in self._stores.items() if key in needed}
        stores: dict[str, RowStore] = {}
        for key in [*missing, *more]:
            total = self._used() + sum(store.bytes for store in stores.values())
            try:
                if key in missing or total + size[key] <= room:
                    stores[key] = self._empty(first[key], [*self._stores.values(), *stores.values()])
            except RowsDiffer:  # the disk is fuller than the limit allows
                if key in missing:
                    raise
        batches = batches_of(self.samples.count, equal=True)
        for rows, columns in record(batches, lambda rows: self._compute(list(stores), rows)):
            for key, values in columns.items():
                stores[key].put(rows, {VALUES: values})
        self._stores |= stores
        self.passes += 1

    def _used(self) -> int:
        return sum(store.bytes for store in self._stores.values())

    def _compute(self, keys: Sequence[str], rows: Sequence[int]) -> Columns:
        """Activations at borders, and batch columns, of some samples."""
        borders = [key for key in keys if not key.startswith(COLUMN)]
        with random_states_kept(), self._computing():
            batch = self.samples.read(rows)
            states = activations(self.model, borders, batch) if borders else {}
        return {key: batch[key.removeprefix(COLUMN)] if key.startswith(COLUMN) else states[key] for key in keys}

    def _empty(self, values: Tensor, others: Sequence[RowStore]) -> RowStore:
        """An empty store, in memory if the others leave enough of it, otherwise in a file."""
        memory = self.cache.memory_gb - sum(store.bytes for store in others if store.in_memory) / GB
        disk = self.cache.disk_gb - sum(store.bytes for store in others if not store.in_memory) / GB
        rest = dataclasses.replace(self.cache, memory_gb=max(0.0, memory), disk_gb=max(0.0, disk))
        return RowStore(self.samples.count, {VALUES: values}, rest)

    def _plain(self, border: str) -> str:
        """A border's name in the model itself: in a copy with adapters it has a prefix and may lie in an adapter."""
        names = dict(self.model.named_modules())
        parts = [part for part in border.split(".") if part != "base_layer"]
        return next(name for name in (".".join(parts[skip:]) for skip in range(len(parts))) if name in names and name)
