"""Confusion matrices: counts of true and predicted classes, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_ft.documents.document import Table
from hf_ft.documents.text import score

GRID = 20  # maximum number of classes in a matrix; with more, confusions are listed
PAIRS = 25  # number of confusions listed


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    Attributes:
        split: the split of the predictions.
        classes: the C class names.
        counts: (C, C), one row per true class.
        seed: the seed of the run that made the predictions, if there were several.
    """

    split: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    seed: int | None = None

    @classmethod
    def of(
        cls,
        split: str,
        classes: Sequence[str],
        labels: Sequence[int],
        predicted: Sequence[int],
        seed: int | None = None,
    ) -> Confusion:
        """Count true and predicted class numbers, (N,) each; classes without a name get their number."""
        names = [str(name) for name in classes]
        names += [str(c) for c in range(len(names), max(*predicted, *labels) + 1)]
        counts = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(counts, (np.asarray(labels), np.asarray(predicted)), 1)
        return cls(split, tuple(names), tuple(tuple(map(int, row)) for row in counts), seed)

    @cached_property
    def support(self) -> tuple[int, ...]:
        """(C,), the number of samples of each class."""
        return tuple(map(sum, self.counts))

    @cached_property
    def recall(self) -> tuple[float | None, ...]:
        """(C,), the recall of each class; None for a class without samples."""
        return tuple(
            row[c] / n if n else None for c, (row, n) in enumerate(zip(self.counts, self.support, strict=True))
        )

    def most_confused(self, limit: int) -> list[tuple[int, int, int]]:
        """True class, predicted class and count of the most frequent errors, in descending order of count."""
        pairs = [(t, p, n) for t, row in enumerate(self.counts) for p, n in enumerate(row) if n and t != p]
        return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:limit]

    def summary(self) -> str:
        """How many predictions are correct, in a clause, and what recall is."""
        right, total = sum(row[c] for c, row in enumerate(self.counts)), sum(self.support)
        return (
            f"{right:,} of {total:,} predictions are correct. Recall is the fraction of a class that is predicted "
            "correctly."
        )

    def tables(self) -> tuple[Table, ...]:
        """The full matrix, or with many classes the most frequent confusions and the recall of each class."""
        few = len(self.classes) <= GRID
        return (confusion_grid(self),) if few else (confused_pairs(self), recall_table(self))


def confusion_grid(table: Confusion) -> Table:
    """All counts with recall, one row per true class."""
    rows, shades = [], []
    for name, counts, n, recall in zip(table.classes, table.counts, table.support, table.recall, strict=True):
        rows.append((name, *(f"{count:,}" for count in counts), f"{n:,}", score(recall)))
        shades.append((0.0, *(count / max(n, 1) for count in counts), 0.0, 0.0))
    headers = ("true class", *(f"predicted {name}" for name in table.classes), "rows", "recall")
    return Table(f"Confusion matrix on {table.split}", headers, tuple(rows), shades=tuple(shades))


def confused_pairs(table: Confusion) -> Table:
    """The most frequent confusions."""
    rows = tuple(
        (table.classes[t], table.classes[p], f"{n:,}", f"{n / table.support[t]:.0%}")
        for t, p, n in table.most_confused(PAIRS)
    )
    return Table(
        f"Most frequent errors on {table.split}", ("true class", "predicted class", "rows", "share of the class"), rows
    )


def recall_table(table: Confusion) -> Table:
    """The recall of each class, in ascending order."""
    order = sorted(range(len(table.classes)), key=lambda c: (table.recall[c] is None, table.recall[c] or 0.0, c))
    rows = tuple((table.classes[c], f"{table.support[c]:,}", score(table.recall[c])) for c in order)
    return Table("Recall by class, lowest first", ("class", "rows", "recall"), rows, folded=True)
