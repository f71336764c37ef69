"""Read rows of any map-style data set."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ft.models.preserve import random_states_kept

GB = 2**30


def read_rows(dataset: Any, rows: Sequence[int]) -> list[Any]:
    """Rows of any map-style data set, in a single call if it supports that."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(rows)))
    return [dataset[row] for row in rows]


def spread_rows(samples: int, count: int) -> list[int]:
    """Indices of ``count`` rows, or all if there are fewer, spread evenly over a data set."""
    return list(range(0, samples, max(1, samples // count)))[:count]


def drawn_rows(samples: int, count: int) -> list[int]:
    """Indices of ``count`` rows, or all if there are fewer, drawn at random, but the same at each call.

    Unlike evenly spread rows, they also catch what recurs at intervals, such as every second row being augmented.
    """
    return sorted(random.Random(0).sample(range(samples), min(count, samples)))


def same_each_time(read: Callable[[], Mapping[str, Any]], times: int = 3) -> bool:
    """Whether reads are deterministic under different global RNG states, which are restored.

    Args:
        read: reads and collates a few rows.
    """
    first: Mapping[str, Any] | None = None
    for seed in range(times):
        with random_states_kept(seed):
            batch = read()
        if first is not None and not _equal(first, batch):
            return False
        first = batch
    return True


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if set(one) != set(other):
        return False
    return all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )
