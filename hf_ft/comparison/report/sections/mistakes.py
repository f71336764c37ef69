"""The winner's errors: confusions, and its most and least confident mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ft.comparison.report.sections.confusion import confusion
from hf_ft.comparison.results import Mistake, Mistakes, Results
from hf_ft.comparison.statistics import Standing, winner
from hf_ft.documents.document import Block, Picture, Section, Table, Text
from hf_ft.documents.text import code, score

PICTURE = "data:image/"  # how a thumbnail begins; anything else that is shown is text


def mistakes(results: Results, standings: Sequence[Standing]) -> Section | None:
    """Which classes the winner confuses, and where it is confident but wrong; None if no classes were predicted."""
    best = winner(results, standings)
    table = confusion(results, best) if best is not None else None
    if best is None or table is None:
        return None
    lead = f"{code(best.name)} with seed {table.seed}, on {table.split}: {table.summary()}"
    return Section("errors", "Errors of the winner", (Text(lead), *table.tables(), *_by_probability(results)))


def _by_probability(results: Results) -> list[Block]:
    """The surest and the least sure mistakes."""
    found = results.mistakes
    if found is None or not found.surest:
        return []
    how = "with the temperature fitted on validation" if found.calibrated else "as trained, without a temperature"
    lead = (
        f"Of {found.number:,} mistakes on {found.split}, these have the highest and the lowest probability of the "
        f"wrong class ({how}). Sure mistakes are often wrong labels or ambiguous samples; unsure ones lie between "
        "classes."
    )
    tables = [_listed("Surest mistakes", results, found, found.surest)]
    if found.least_sure:
        tables.append(_listed("Least sure mistakes", results, found, found.least_sure))
    return [Text(lead), *tables]


def _listed(caption: str, results: Results, found: Mistakes, listed: Sequence[Mistake]) -> Table:
    classes = results.data.get("classes") or ()
    rows = tuple((_sample(one), classes[one.true], classes[one.predicted], score(one.probability)) for one in listed)
    headers = ("sample", "true class", "predicted class", "probability")
    return Table(f"{caption} on {found.split}", headers, rows, folded=True)


def _sample(one: Mistake) -> str | Picture:
    if one.shown.startswith(PICTURE):
        return Picture(one.sample, one.shown)
    return f"{one.sample}: {one.shown}" if one.shown else one.sample
