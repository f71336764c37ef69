"""Recorded activations of one set of samples at any border of one model, for searches that train it many times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.core.context import FrozenCache, Samples
from hf_ft.data.rows import GB, same_each_time
from hf_ft.engine.batch import ACTIVATION
from hf_ft.engine.frozen.find_prefix import PrefixFinder
from hf_ft.engine.frozen.freezing import Liveness
from hf_ft.engine.frozen.prefix import FrozenPrefix
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore
from hf_ft.engine.objective import Objective
from hf_ft.models.feature_hooks import activations
from hf_ft.models.parts import Chain
from hf_ft.models.preserve import random_states_kept

logger = logging.get_logger(__name__)
VALUES = "values"  # the one column of a store
COLUMN = "column:"  # before the name of a column of the batch, to tell it from a border
PASS = 64  # samples in a batch of a recording pass; larger ones are slower on a CPU


@dataclass(frozen=True)
class RecordedRows:
    """All samples at the borders of one prefix: activations and the columns beside them, each from its own store."""

    stores: Mapping[str, RowStore]  # by the name of the column in a batch

    def take(self, rows: Tensor) -> Columns:
        """Rows by number."""
        return {name: store.take(rows)[VALUES] for name, store in self.stores.items()}


class Recordings:
    """The activations of all samples at the borders of a model's frozen prefixes, each computed once.

    One pass records as many of the planned borders as there is room for, in the order in which they were planned.

    Args:
        model: with the weights that the prefixes keep; never changed.
        samples: recorded where they are the same each time they are read.
        cache: whether, and how much room there is.
        computing: the context in which the model computes, such as autocast.
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
        self._stores: dict[str, RowStore] = {}  # by border, and by column of the batch
        self._planned: dict[str, None] = {}
        self._finder: PrefixFinder | None = None
        self.passes = 0
        some = list(range(0, samples.count, max(1, samples.count // 8)))[:8]
        usable = samples.count >= 4 and cache.use != "never"
        self.usable = usable and (cache.use == "always" or same_each_time(lambda: samples.read(some)))

    def prefix(self, objective: Objective) -> FrozenPrefix | None:
        """What can be left out in the present stage of a copy of the model, perhaps one with adapters."""
        return None if objective.wants_inputs else self.prefix_of(objective.model, objective.alive)

    def prefix_of(self, model: nn.Module, alive: Liveness) -> FrozenPrefix | None:
        """What can be left out of a copy of the model, or of itself, where this is alive."""
        if not self.usable or not alive.has_prefix:
            return None
        # Copies differ in what follows the prefix only.
        key = tuple(Chain(chain.name, chain.parts[:1]) for chain in alive.chains)
        if key not in self._prefixes:
            with random_states_kept(), self._computing():
                finder = self._finder_of(model)
                found = None if finder is None else finder.find(alive.chains)
            # Not with the copy it was found on, which would stay in memory.
            self._prefixes[key] = None if found is None else dataclasses.replace(found, model=self.model)
        found = self._prefixes[key]
        return None if found is None else dataclasses.replace(found, model=model)

    def _finder_of(self, model: nn.Module) -> PrefixFinder | None:
        """One for the model and all of its copies; a copy with adapters has other modules, and its own."""
        small = self.samples.read([0, 1]), self.samples.read([0, 2, 3])
        if [name for name, _ in model.named_modules()] != [name for name, _ in self.model.named_modules()]:
            return PrefixFinder.of(model, *small)
        if self._finder is None:
            self._finder = PrefixFinder.of(self.model, *small)
        return self._finder

    def plan(self, prefix: FrozenPrefix) -> None:
        """Record these borders, too, in the next pass if there is room: they will be asked for."""
        self._planned |= dict.fromkeys(map(self._plain, prefix.borders))

    def store(self, prefix: FrozenPrefix) -> RecordedRows | None:
        """All samples at a prefix's borders.

        Returns:
            None where they cannot be kept; the reason is logged.
        """
        borders = {f"{ACTIVATION}{place}": self._plain(border) for place, border in enumerate(prefix.borders)}
        columns = {**borders, **{name: f"{COLUMN}{name}" for name in prefix.kept}}
        try:
            if any(key not in self._stores for key in columns.values()):
                self._fill(list(columns.values()))
        except RowsDiffer as error:
            logger.warning_once(f"The frozen part of the model is computed in every step: {error}.")
            self.usable = error.column is None and self.usable  # else rows differ, at whatever border
            return None
        return RecordedRows({name: self._stores[key] for name, key in columns.items()})

    def _fill(self, needed: Sequence[str]) -> None:
        """Record what is needed, and of what is planned as much as there is room for."""
        more = [border for border in self._planned if border not in self._stores and border not in needed]
        missing = [key for key in needed if key not in self._stores]
        first = self._compute([*missing, *more], [0])
        room = (self.cache.memory_gb + self.cache.disk_gb) * GB
        size = {key: self.samples.count * math.prod(v.shape[1:]) * v.element_size() for key, v in first.items()}
        if self._used() + sum(size[key] for key in missing) > room:
            self._stores = {key: store for key, store in self._stores.items() if key in needed}
        stores: dict[str, RowStore] = {}
        for key in [*missing, *more]:
            used = self._used() + sum(store.bytes for store in stores.values())
            if key in missing or used + size[key] <= room:
                stores[key] = self._empty(first[key], [*self._stores.values(), *stores.values()])
        for start in range(0, self.samples.count, PASS):
            # All batches as large: kernels for a few samples round otherwise, and training may amplify that.
            end = min(start + PASS, self.samples.count)
            rows = list(range(max(0, end - PASS), end))
            for key, values in self._compute(list(stores), rows).items():
                stores[key].put(torch.tensor(rows), {VALUES: values})
        self._stores |= stores
        self.passes += 1

    def _used(self) -> int:
        return sum(store.bytes for store in self._stores.values())

    def _compute(self, keys: Sequence[str], rows: Sequence[int]) -> Columns:
        """Activations at borders, and columns of the batch, of some samples."""
        borders = [key for key in keys if not key.startswith(COLUMN)]
        with random_states_kept(), self._computing():
            batch = self.samples.read(rows)
            found = activations(self.model, borders, batch) if borders else {}
        return {key: batch[key.removeprefix(COLUMN)] if key.startswith(COLUMN) else found[key] for key in keys}

    def _empty(self, values: Tensor, others: Sequence[RowStore]) -> RowStore:
        """A store in memory as far as the others leave room there, else in a file."""
        memory = self.cache.memory_gb - sum(store.bytes for store in others if store.in_memory) / GB
        disk = self.cache.disk_gb - sum(store.bytes for store in others if not store.in_memory) / GB
        left = dataclasses.replace(self.cache, memory_gb=max(0.0, memory), disk_gb=max(0.0, disk))
        return RowStore(self.samples.count, {VALUES: values}, left)

    def _plain(self, border: str) -> str:
        """A border's name in the model itself: a copy with adapters has it under a prefix, and inside of an adapter."""
        names = dict(self.model.named_modules())
        parts = [part for part in border.split(".") if part != "base_layer"]
        return next(name for name in (".".join(parts[skip:]) for skip in range(len(parts))) if name in names and name)
