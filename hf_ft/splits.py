"""Draw splits with exact sizes and class proportions that never lose a class from training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import transformers as hf
from datasets import Dataset, DatasetDict
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from hf_ft.errors import DataError, OptionError

logger = hf.utils.logging.get_logger(__name__)

SHOWN = 5  # classes named in a message
FINEST = 20  # parts from which a held-out share is assembled if groups stay whole


def stratified_rows(labels: np.ndarray, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Draw disjoint splits of exactly these sizes, stratified by class as far as the rows allow.

    The first split, which is the training split, gets a row of every class before any other does, since a class
    without training rows cannot be learned. A class with a single row is therefore in the first split.

    Args:
        labels: class of each row, (n,).
        sizes: number of rows of each split, at most n in total.

    Returns:
        Row indices by split, in random order.
    """
    remaining, parts = np.arange(len(labels)), {}
    for place, (name, size) in enumerate(sizes.items()):
        parts[name], remaining = _draw(remaining, labels[remaining], size, seed, every_class=place == 0)
    return parts


def _draw(
    rows: np.ndarray, labels: np.ndarray, size: int, seed: int, every_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows; return the drawn and the remaining rows."""
    if size in (0, len(rows)):  # scikit-learn's splitter rejects an empty side
        rows = np.random.default_rng(seed).permutation(rows)
        return rows[:size], rows[size:]
    counts = np.unique(labels, return_counts=True)[1]
    splittable = counts.min() > 1 and min(size, len(rows) - size) >= len(counts)
    # It rounds class sizes at random: a class with an expected size below one row may get none.
    if splittable and (not every_class or counts.min() * size >= len(rows)):
        sample, remaining = train_test_split(rows, train_size=size, random_state=seed, stratify=labels)
        return sample, remaining
    return _draw_rare(rows, labels, size, seed, every_class)


def _draw_rare(
    rows: np.ndarray, labels: np.ndarray, size: int, seed: int, every_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Like ``_draw``, for when some classes have too few rows for scikit-learn's splitter."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    classes, counts = np.unique(labels, return_counts=True)
    mask = np.zeros(len(rows), dtype=bool)
    for one, count in zip(classes, _class_sizes(counts, size, every_class, generator), strict=True):
        mask[order[labels[order] == one][:count]] = True
    return rows[order[mask[order]]], rows[order[~mask[order]]]


def _class_sizes(counts: np.ndarray, size: int, every_class: bool, generator: np.random.Generator) -> np.ndarray:
    """The number of rows to draw per class, (C,): proportional sizes rounded to integers that sum to ``size``.

    Args:
        counts: number of rows of each class, (C,).
        every_class: draw at least one row of each class, if ``size`` allows.
    """
    shares = counts * size / counts.sum()
    least = np.full(len(counts), int(every_class and size >= len(counts)))
    sizes = np.maximum(np.floor(shares).astype(int), least)
    chance = generator.random(len(counts))  # ties are broken at random
    while (missing := size - int(sizes.sum())) != 0:
        change = 1 if missing > 0 else -1
        possible = sizes < counts if change > 0 else sizes > least
        gain = np.where(possible, change * (shares - sizes), -np.inf)
        sizes[np.lexsort((chance, gain))[-1]] += change
    return sizes


def grouped_folds(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """Divide rows into parts of about equal size and class proportions, each group in a single part.

    Uses scikit-learn's ``StratifiedGroupKFold``; if all classes have fewer rows than there are parts, only the sizes of
    the parts are balanced.

    Args:
        labels: class of each row, (n,).
        groups: group of each row, (n,).
        parts: at most the number of groups.

    Returns:
        Row indices by part, ascending.
    """
    if np.unique(labels, return_counts=True)[1].max(initial=0) < parts:
        labels = np.zeros(len(groups), dtype=int)
    folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some classes have fewer rows than there are parts
        return [held_out for _, held_out in folds.split(labels, labels, groups)]


def grouped_share(labels: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw about this share of the rows, in whole groups, with about the same class proportions.

    Of several draws, the one is chosen that leaves the most classes among the other rows, has the most classes itself,
    and is closest to the requested size, in this order.

    Args:
        labels: class of each row, (n,).
        groups: group of each row, (n,); at least two.
        share: between 0 and 1.

    Returns:
        Row indices, ascending; at least one row, and not all.
    """
    most = min(FINEST, len(np.unique(groups)))
    wanted = Fraction(share).limit_denominator(most)
    parts = max(2, wanted.denominator if 0 < wanted < 1 else most)
    count = min(max(1, round(share * parts)), parts - 1)
    folds = grouped_folds(labels, groups, parts, seed)
    draws = [np.concatenate([folds[(first + i) % parts] for i in range(count)]) for first in range(parts)]

    def badness(rows: np.ndarray) -> tuple[int, int, float]:
        others = np.delete(labels, rows)
        return -len(np.unique(others)), -len(np.unique(labels[rows])), abs(len(rows) - share * len(labels))

    return np.sort(min(draws, key=badness))


def hold_out(
    count: int, size: int, labels: np.ndarray | None = None, groups: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows into those for training and those that are held out.

    Args:
        count: number of rows.
        size: number of rows to hold out; with groups, about as many.
        labels: class of each row, (count,): the split is stratified if each class has enough rows.
        groups: group of each row, (count,): a group is held out as a whole or not at all.

    Raises:
        OptionError: if all rows belong to one group.
    """
    if groups is None:
        counts = np.unique(labels, return_counts=True)[1] if labels is not None else np.array([0])
        fits = counts.min() > 1 and min(size, count - size) >= len(counts)
        rows = np.arange(count)
        return tuple(train_test_split(rows, test_size=size, random_state=seed, stratify=labels if fits else None))
    if len(np.unique(groups)) < 2:
        raise OptionError(f"all {count} training samples belong to one group, so none can be held out.")
    held_out = grouped_share(np.zeros(count, int) if labels is None else labels, groups, size / count, seed)
    return np.setdiff1d(np.arange(count), held_out), held_out


def may_be_held_out(labels: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """The rows that can be held out, each alone or with its group, while every class can still be learned.

    A class with a single row, or whose rows are all in one group, is always in training, and so is that group.

    Args:
        labels: class of each row, (n,).
        groups: group of each row, (n,); None if each row stands for itself.

    Returns:
        Row indices, ascending.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    classes, counts = np.unique(pairs[0], return_counts=True)  # groups of each class
    always = np.unique(groups[np.isin(labels, classes[counts == 1])])
    return np.flatnonzero(~np.isin(groups, always))


def most_parts(labels: np.ndarray, groups: np.ndarray | None = None) -> int:
    """The largest number of parts for :func:`held_out_parts`: the number of rows, or groups, that may be held out."""
    rows = may_be_held_out(labels, groups)
    return len(rows) if groups is None else len(np.unique(groups[rows]))


def held_out_parts(
    labels: np.ndarray, parts: int, groups: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Divide the rows that may be held out into parts of about equal size and class proportions, in whole groups.

    Args:
        labels: class of each row, (n,).
        parts: at most :func:`most_parts`.
        groups: group of each row, (n,); None if each row stands for itself.

    Returns:
        Row indices by part, ascending.
    """
    rows = may_be_held_out(labels, groups)
    if groups is not None:
        return tuple(rows[part] for part in grouped_folds(labels[rows], groups[rows], parts, seed))
    sizes = {str(number): len(part) for number, part in enumerate(np.array_split(rows, parts))}
    return tuple(np.sort(rows[part]) for part in stratified_rows(labels[rows], sizes, seed).values())


def absent_classes(
    labels: np.ndarray, parts: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> str | None:
    """A sentence that names the classes missing from any split, or None if every split has all classes.

    Args:
        labels: labels of all rows before the split, (n,).
        parts: labels of each split.
        names: class names, if labels are class indices.
    """
    counts = dict(zip(*np.unique(labels, return_counts=True), strict=True))

    def shown(value: Any) -> str:
        name = value if names is None else names[value]
        return f"{str(name)!r} ({counts[value]} row{'s' if counts[value] > 1 else ''})"

    gaps = []
    for part, present in parts.items():
        absent = sorted(set(counts) - set(np.unique(present)), key=lambda value: (counts[value], str(value)))
        if absent and len(present):
            more = f" and {len(absent) - SHOWN} more classes" if len(absent) > SHOWN else ""
            gaps.append(f"{part} has none of {', '.join(map(shown, absent[:SHOWN]))}{more}")
    if not gaps:
        return None
    return (
        f"too few rows of some classes: {'; '.join(gaps)}. Classes missing from a split can be neither learned nor "
        "scored there."
    )


def stratified_split(
    dataset: Dataset,
    train: int = 500,
    validation: int = 250,
    test: int | None = None,
    seed: int = 0,
    by: str | None = "label",
) -> DatasetDict:
    """Split by numbers of rows (test: all remaining rows by default), stratified by column ``by``.

    If a class has too few rows for that, training has priority (:func:`hf_ft.splits.stratified_rows`), and a warning
    names the class.

    Raises:
        DataError: if the data set has fewer rows than requested.
    """
    sizes = {"train": train, "validation": validation}
    sizes["test"] = len(dataset) - train - validation if test is None else test
    if min(sizes.values()) < 0 or sum(sizes.values()) > len(dataset):
        raise DataError(f"cannot split {len(dataset)} rows into {sizes}: request fewer")
    labels = np.zeros(len(dataset)) if by is None else np.asarray(dataset.with_format(None)[by][:])
    rows = stratified_rows(labels, sizes, seed)
    names = getattr(dataset.features[by], "names", None) if by is not None else None
    if absent := absent_classes(labels, {name: labels[indices] for name, indices in rows.items()}, names):
        logger.warning(absent)
    return DatasetDict({name: dataset.select(indices) for name, indices in rows.items()})
