"""Parts of the training samples that take turns as held-out samples, and a context that sees only the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hf_ft.core.context import Context, Samples
from hf_ft.data.sampling import share_of_batches
from hf_ft.errors import OptionError
from hf_ft.splits import stratified_rows


@dataclasses.dataclass(frozen=True)
class Fold:
    """Indices of the samples to train on, and of those held out."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def folds_of(count: int, labels: np.ndarray | None, parts: int) -> tuple[Fold, ...]:
    """Divide samples into folds with the same class proportions; a class with a single sample always trains.

    Args:
        count: number of samples.
        labels: (count,), their classes; None if they have no single class, or it is not known.
        parts: number of folds.

    Raises:
        OptionError: if there are too few samples.
    """
    labels = np.zeros(count, dtype=int) if labels is None else labels
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    dealt = np.flatnonzero(counts[places] > 1)
    if len(dealt) < max(2, parts):
        raise OptionError(
            f"{len(dealt)} training samples, of classes with at least two, are too few for {parts} folds."
        )
    sizes = {str(fold): len(part) for fold, part in enumerate(np.array_split(dealt, parts))}
    drawn = stratified_rows(labels[dealt], sizes, seed=0)
    held_out = [np.sort(dealt[rows]) for rows in drawn.values()]
    everything = np.arange(count)
    return tuple(Fold(tuple(np.setdiff1d(everything, own).tolist()), tuple(own.tolist())) for own in held_out)


def context_on(context: Context, rows: Sequence[int] | None = None) -> Context:
    """The context restricted to these training samples (None: all of them), with a fresh generator.

    Nothing that is measured in it is kept in the folder.
    """
    seed = context.generator.initial_seed()
    fresh = torch.Generator().manual_seed(seed)
    if rows is None:
        return dataclasses.replace(context, generator=fresh)
    chosen, size = list(rows), context.recipe.batch_size

    def read(some: Sequence[int]) -> dict[str, Any]:
        return context.samples.read([chosen[index] for index in some])

    def batches() -> Iterator[dict[str, Any]]:
        return map(read, share_of_batches(len(chosen), size, seed, context.rank, context.ranks))

    return dataclasses.replace(
        context,
        batches=batches,
        samples=Samples(len(chosen), read),
        labels=None if context.labels is None else context.labels[chosen],
        generator=fresh,
        folder=None,
    )
