"""The winner's errors: the full confusion matrix, or a list of the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ft.comparison.report.sections.confusion import Confusion, confusion
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import Standing, winner
from hf_ft.documents.document import Section, Table, Text
from hf_ft.documents.text import code, score

GRID = 20  # maximum number of classes in a matrix; with more, confusions are listed
PAIRS = 25  # number of confusions listed


def mistakes(results: Results, standings: Sequence[Standing]) -> Section | None:
    """Which classes the winner confuses; None if no classes were predicted."""
    best = winner(results, standings)
    table = confusion(results, best) if best is not None else None
    if best is None or table is None:
        return None
    right, total = sum(row[c] for c, row in enumerate(table.counts)), sum(table.support)
    lead = (
        f"{code(best.name)} with seed {table.seed}, on {table.split}: {right:,} of {total:,} predictions are correct. "
        "Recall is the fraction of a class that is predicted correctly."
    )
    few = len(table.classes) <= GRID
    shown = (confusion_grid(table),) if few else (confused_pairs(table), recall_table(table))
    return Section("errors", "Errors of the winner", (Text(lead), *shown))


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
