"""Which rows go into which split: exact sizes, the shares of the classes, and no class lost from training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers as hf
from datasets import Dataset, DatasetDict
from sklearn.model_selection import train_test_split

from hf_ft.errors import DataError

logger = hf.utils.logging.get_logger(__name__)

SHOWN = 5  # classes that a message names


def stratified_rows(labels: np.ndarray, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Draw disjoint splits of exactly these sizes, each with the shares of the classes as far as there are rows.

    The first split, which is trained on, gets a row of every class before any other does: a class without a training
    row cannot be learned. So a class with a single row is in the first split.

    Args:
        labels: the class of each row, (n,).
        sizes: rows of each split, at most n in all.

    Returns:
        Row numbers by split, in random order.
    """
    left, parts = np.arange(len(labels)), {}
    for place, (name, size) in enumerate(sizes.items()):
        parts[name], left = _draw(left, labels[left], size, seed, every_class=place == 0)
    return parts


def _draw(
    rows: np.ndarray, labels: np.ndarray, size: int, seed: int, every_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are drawn, and those that are left."""
    if size in (0, len(rows)):  # scikit-learn's splitter refuses an empty side
        rows = np.random.default_rng(seed).permutation(rows)
        return rows[:size], rows[size:]
    counts = np.unique(labels, return_counts=True)[1]
    splittable = counts.min() > 1 and min(size, len(rows) - size) >= len(counts)
    # Its shares are rounded at random: a class that should have less than one row may get none.
    if splittable and (not every_class or counts.min() * size >= len(rows)):
        picked, left = train_test_split(rows, train_size=size, random_state=seed, stratify=labels)
        return picked, left
    return _draw_rare(rows, labels, size, seed, every_class)


def _draw_rare(
    rows: np.ndarray, labels: np.ndarray, size: int, seed: int, every_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The same where some classes have too few rows for scikit-learn's splitter."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    classes, counts = np.unique(labels, return_counts=True)
    chosen = np.zeros(len(rows), dtype=bool)
    for one, count in zip(classes, _class_sizes(counts, size, every_class, generator), strict=True):
        chosen[order[labels[order] == one][:count]] = True
    return rows[order[chosen[order]]], rows[order[~chosen[order]]]


def _class_sizes(counts: np.ndarray, size: int, every_class: bool, generator: np.random.Generator) -> np.ndarray:
    """How many rows to draw of each class, (C,): the shares rounded to whole rows, ``size`` in all.

    Args:
        counts: rows of each class, (C,).
        every_class: draw one of each class at least, where ``size`` allows.
    """
    shares = counts * size / counts.sum()
    least = np.full(len(counts), int(every_class and size >= len(counts)))
    drawn = np.maximum(np.floor(shares).astype(int), least)
    chance = generator.random(len(counts))  # equal shares are rounded up or down by lot
    while (missing := size - int(drawn.sum())) != 0:
        change = 1 if missing > 0 else -1
        possible = drawn < counts if change > 0 else drawn > least
        gain = np.where(possible, change * (shares - drawn), -np.inf)
        drawn[np.lexsort((chance, gain))[-1]] += change
    return drawn


def absent_classes(
    labels: np.ndarray, parts: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> str | None:
    """A sentence that names the classes of which a split has no row; None where all splits have all classes.

    Args:
        labels: of all rows that were split, (n,).
        parts: the labels of each split.
        names: of the classes, where labels are their numbers.
    """
    counts = dict(zip(*np.unique(labels, return_counts=True), strict=True))

    def shown(value: Any) -> str:
        name = value if names is None else names[value]
        return f"{str(name)!r} ({counts[value]} row{'s' if counts[value] > 1 else ''})"

    found = []
    for part, present in parts.items():
        absent = sorted(set(counts) - set(np.unique(present)), key=lambda value: (counts[value], str(value)))
        if absent and len(present):
            more = f" and {len(absent) - SHOWN} more classes" if len(absent) > SHOWN else ""
            found.append(f"{part} has none of {', '.join(map(shown, absent[:SHOWN]))}{more}")
    if not found:
        return None
    return (
        f"too few rows of some classes: {'; '.join(found)}. What a split lacks can be neither learned nor scored there."
    )


def stratified_split(
    dataset: Dataset,
    train: int = 500,
    validation: int = 250,
    test: int | None = None,
    seed: int = 0,
    by: str | None = "label",
) -> DatasetDict:
    """Split by numbers of rows (test: default all that are left), each with the shares of column ``by``.

    Where a class has too few rows for that, training comes first (:func:`hf_ft.splits.stratified_rows`), and a warning
    names the class.

    Raises:
        DataError: the data set has fewer rows than asked for.
    """
    sizes = {"train": train, "validation": validation}
    sizes["test"] = len(dataset) - train - validation if test is None else test
    if min(sizes.values()) < 0 or sum(sizes.values()) > len(dataset):
        raise DataError(f"cannot split {len(dataset)} rows into {sizes}: ask for fewer")
    labels = np.zeros(len(dataset)) if by is None else np.asarray(dataset.with_format(None)[by][:])
    rows = stratified_rows(labels, sizes, seed)
    names = getattr(dataset.features[by], "names", None) if by is not None else None
    if absent := absent_classes(labels, {name: labels[chosen] for name, chosen in rows.items()}, names):
        logger.warning(absent)
    return DatasetDict({name: dataset.select(chosen) for name, chosen in rows.items()})
