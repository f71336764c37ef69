"""The winner's errors: the full confusion matrix, or a list of the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ft.comparison.report.sections.confusion import confusion
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import Standing, winner
from hf_ft.documents.document import Section, Text
from hf_ft.documents.text import code


def mistakes(results: Results, standings: Sequence[Standing]) -> Section | None:
    """Which classes the winner confuses; None if no classes were predicted."""
    best = winner(results, standings)
    table = confusion(results, best) if best is not None else None
    if best is None or table is None:
        return None
    lead = f"{code(best.name)} with seed {table.seed}, on {table.split}: {table.summary()}"
    return Section("errors", "Errors of the winner", (Text(lead), *table.tables()))
