"""Recorded activations of one set of samples at any border of one model, for searches that train it many times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.frozen_prefix import FrozenPrefix, activations, find_prefix
from hf_ft.objective import ACTIVATION, Objective
from hf_ft.row_cache import GB, Columns, FrozenCache, RowsDiffer, RowStore, same_each_time
from hf_ft.undisturbed import random_states_kept

logger = logging.get_logger(__name__)
PASS = 64  # samples in a batch of a recording pass; larger ones are slower on a CPU


@dataclass(frozen=True)
class Samples:
    """Training samples by number.

    Attributes:
        count: how many there are.
        read: reads some of them, by number, as keyword arguments of the model on its device.
    """

    count: int
    read: Callable[[Sequence[int]], dict[str, Any]]


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
        self._prefixes: dict[str, FrozenPrefix | None] = {}
        self._stores: dict[str, RowStore] = {}
        self._planned: dict[str, None] = {}
        self.passes = 0
        some = list(range(0, samples.count, max(1, samples.count // 8)))[:8]
        usable = samples.count >= 4 and cache.use != "never"
        self.usable = usable and (cache.use == "always" or same_each_time(lambda: samples.read(some)))

    def prefix(self, objective: Objective) -> FrozenPrefix | None:
        """What can be left out in the present stage of a copy of the model, perhaps one with adapters."""
        live = objective.live_parts
        if not self.usable or objective.wants_inputs or not 0 < len(live) < len(objective.parts):
            return None
        key = live[0].modules[0]  # copies differ in what follows the prefix only
        if key not in self._prefixes:
            with random_states_kept(), self._computing():
                small = self.samples.read([0, 1]), self.samples.read([0, 2, 3])
                found = find_prefix(objective.model, live, *small)
            # Not with the copy it was found on, which would stay in memory.
            self._prefixes[key] = None if found is None else dataclasses.replace(found, model=self.model)
        found = self._prefixes[key]
        return None if found is None else dataclasses.replace(found, model=objective.model)

    def plan(self, prefix: FrozenPrefix) -> None:
        """Record this border, too, in the next pass if there is room: it will be asked for."""
        self._planned[self._plain(prefix.border)] = None

    def store(self, prefix: FrozenPrefix) -> RowStore | None:
        """All samples' activations at a border.

        Returns:
            None where they cannot be kept; the reason is logged.
        """
        name = self._plain(prefix.border)
        if name not in self._stores:
            try:
                self._fill(prefix, [name, *self._planned])
            except RowsDiffer as error:
                logger.warning_once(f"The frozen part of the model is computed in every step: {error}.")
                self.usable = False
        return self._stores.get(name)

    def _fill(self, prefix: FrozenPrefix, names: Sequence[str]) -> None:
        wanted = [name for name in dict.fromkeys(names) if name not in self._stores]
        with random_states_kept(), self._computing():
            rows = self.samples.read([0])
            kept = {name: rows[name] for name in prefix.kept}
            first = activations(self.model, wanted, rows)
        room = (self.cache.memory_gb + self.cache.disk_gb) * GB
        used = sum(store.bytes for store in self._stores.values())
        chosen = []
        for name in wanted:
            size = self.samples.count * math.prod(first[name].shape[1:]) * first[name].element_size()
            if name == wanted[0] and used + size > room:
                self._stores.clear()
                used = 0
            if name == wanted[0] or used + size <= room:
                chosen.append(name)
                used += size
        stores: dict[str, RowStore] = {}
        for name in chosen:
            stores[name] = self._empty(first[name], kept, [*self._stores.values(), *stores.values()])
        self._record(chosen, stores, prefix.kept)
        self._stores |= stores
        self.passes += 1

    def _empty(self, activation: Tensor, kept: Columns, others: Sequence[RowStore]) -> RowStore:
        """A store in memory as far as the others leave room there, else in a file."""
        used = sum(store.bytes for store in others if store.in_memory)
        free = max(0.0, self.cache.memory_gb - used / GB)
        return RowStore(
            self.samples.count, {ACTIVATION: activation, **kept}, dataclasses.replace(self.cache, memory_gb=free)
        )

    def _record(self, names: Sequence[str], stores: dict[str, RowStore], kept: Sequence[str]) -> None:
        for start in range(0, self.samples.count, PASS):
            rows = list(range(start, min(start + PASS, self.samples.count)))
            with random_states_kept(), self._computing():
                batch = self.samples.read(rows)
                found = activations(self.model, names, batch)
            columns = {name: batch[name] for name in kept}
            for name, store in stores.items():
                store.put(torch.tensor(rows), {ACTIVATION: found[name], **columns})

    def _plain(self, border: str) -> str:
        """A border's name in the model itself: a copy with adapters has it under a prefix."""
        names = dict(self.model.named_modules())
        parts = border.split(".")
        return next(name for name in (".".join(parts[skip:]) for skip in range(len(parts))) if name in names and name)
