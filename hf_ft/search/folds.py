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
from hf_ft.splits import held_out_parts, most_parts


@dataclasses.dataclass(frozen=True)
class Fold:
    """Indices of the samples to train on, and of those held out."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def folds_of(count: int, labels: np.ndarray | None, parts: int, groups: np.ndarray | None = None) -> tuple[Fold, ...]:
    """Divide samples into folds with about the same class proportions.

    A class with a single sample, or with a single group, is always in training.

    Args:
        count: number of samples.
        labels: (count,), their classes; None if they have no single class, or if it is unknown.
        parts: number of folds.
        groups: (count,), numbers of groups that stay whole; None if each sample stands for itself.

    Raises:
        OptionError: if there are too few samples or groups.
    """
    labels = np.zeros(count, dtype=int) if labels is None else labels
    units = most_parts(labels, groups)
    if units < max(2, parts):
        what = "training samples" if groups is None else "groups of training samples"
        raise OptionError(
            f"{units} {what}, in classes with at least two, are too few for {parts} folds: set fewer folds (at least "
            "2), or provide more of them."
        )
    everything = np.arange(count)
    held_out = held_out_parts(labels, parts, groups)
    return tuple(Fold(tuple(np.setdiff1d(everything, own).tolist()), tuple(own.tolist())) for own in held_out)


def context_on(context: Context, rows: Sequence[int] | None = None) -> Context:
    """The context restricted to these training samples (None: all of them), with a fresh generator.

    Nothing measured in it is kept in the folder.
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
        groups=None if context.groups is None else context.groups[chosen],
        generator=fresh,
        folder=None,
    )
