"""The appendix of the report: data, failures, advice, and everything needed to reproduce the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_ft.comparison.results import FoundInData, Results
from hf_ft.comparison.statistics import Standing
from hf_ft.core.config import Paper, strategies
from hf_ft.documents.document import Block, Bullets, Link, Listing, Section, Table, Tables, Text
from hf_ft.documents.text import NONE, code, duration, plain

FIRST = 20  # number of skipped rows listed


def record_sections(results: Results, standings: Sequence[Standing]) -> list[Section]:
    """All non-empty sections of the appendix."""
    sections = (data(results), problems(standings), advice(results), about(results, standings))
    return [section for section in sections if section is not None]


def data(results: Results) -> Section:
    """Sizes, classes, skipped rows, licences."""
    content = results.data
    sizes, counts = content.get("sizes") or {}, content.get("class_counts") or {}
    notes = [str(note) for note in (*(content.get("notes") or ()), *(content.get("notices") or ()))]
    for split, rows in (content.get("skipped") or {}).items():
        if rows:
            notes.append(f"{_counted(rows, split)} could not be read and were skipped{_which(rows)}.")
    by_split = "; ".join(f"{split} {size:,}" for split, size in sizes.items())
    blocks: list[Block] = [Text(f"Data set {code(str(content.get('name', '')))}. Rows: {by_split or 'not counted'}.")]
    if notes:
        blocks.append(Bullets(tuple(notes)))
    blocks += checks(content.get("checks"))
    if counts:
        classes = [str(name) for name in content.get("classes") or ()]
        rows = tuple(
            (name, *(f"{of[c]:,}" if c < len(of) else NONE for of in counts.values())) for c, name in enumerate(classes)
        )
        blocks.append(Table("Rows by class", ("class", *counts), rows, folded=len(classes) > FIRST))
    return Section("data", "Data", tuple(blocks))


def checks(found: FoundInData | None) -> list[Block]:
    """The findings of the data checks."""
    if found is None:
        return []
    said = tuple(f"{sentence}." for sentence in found["said"])
    blocks: list[Block] = [Text("Checks before the first training:"), Bullets(said)]
    rows = tuple(
        (
            "equal" if one.kind == "same" else "nearly equal",
            "; ".join(map(str, one.samples[:FIRST]))
            + (f"; and {len(one.samples) - FIRST} more" if len(one.samples) > FIRST else ""),
        )
        for one in found["duplicates"]
    )
    if rows:
        shown = f", {len(rows)} of {found['sets']:,} sets" if found["sets"] > len(rows) else ""
        caption = f"Duplicates{shown}: split, row, file, label"
        blocks.append(Table(caption, ("duplicates", "samples"), rows, folded=True))
    return blocks


def _counted(rows: int | Sequence[Any], split: str) -> str:
    number = rows if isinstance(rows, int) else len(rows)
    return f"{number:,} row{'s' if number > 1 else ''} of {split}"


def _which(rows: int | Sequence[Any]) -> str:
    """The first skipped rows, if they are known."""
    if isinstance(rows, int):
        return ""
    more = f" and {len(rows) - FIRST} more" if len(rows) > FIRST else ""
    return ": " + "; ".join(map(plain, rows[:FIRST])) + more


def problems(standings: Sequence[Standing]) -> Section | None:
    """Contenders that could not run, failures and warnings; None if there were none."""
    stopped = tuple((s.name, s.contender.status, s.contender.reason or NONE) for s in standings if s.rank is None)
    failed = tuple(
        (standing.name, f"trial {number}" if kind == "trial" else f"run with seed {training.seed}", training.error)
        for standing in standings
        for kind, trainings in (("trial", standing.contender.trials), ("final run", standing.contender.runs))
        for number, training in enumerate(trainings, start=1)
        if training.error
    )
    warned = [f"{standing.name}: {note}." for standing in standings for note in _notes(standing)]
    blocks: list[Block] = []
    if stopped:
        blocks.append(Table("Unranked strategies", ("strategy", "status", "reason"), stopped))
    if failed:
        blocks.append(Table("Failed runs", ("strategy", "run", "error"), failed))
    if warned:
        blocks += [Text("Warnings during the comparison:"), Bullets(tuple(warned))]
    title = "Failures and warnings" if stopped or failed else "Warnings"
    return Section("problems", title, tuple(blocks)) if blocks else None


def _notes(standing: Standing) -> list[str]:
    contender = standing.contender
    warnings = [w for training in (*contender.trials, *contender.runs) for w in training.warnings]
    return [str(note).rstrip(".") for note in dict.fromkeys((*contender.notes, *warnings))]


def advice(results: Results) -> Section | None:
    """The order recommended before the comparison."""
    rows = tuple(
        (
            str(item.get("strategy", "")),
            str(place),
            " ".join(f"{str(reason.get('text', '')).rstrip('.')}." for reason in _mappings(item.get("reasons"))),
        )
        for place, item in enumerate(_mappings((results.advice or {}).get("recommendations")), start=1)
    )
    if not rows:
        return None
    lead = "Earlier comparisons and cheap measurements on the training data suggested this order before any training."
    table = Table("Advised order", ("strategy", "rank", "reasons"), rows)
    return Section("advice", "Advice", (Text(lead), table))


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list; the advice is kept as it was given, without a fixed form."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list | tuple) else []


def about(results: Results, standings: Sequence[Standing]) -> Section:
    """Command, settings, versions, machine, and the papers of the strategies."""
    shared = (("settings", results.settings), ("model", results.model), ("machine", results.machine))
    tables = Tables(
        tuple(
            Table(title.capitalize(), ("name", "value"), tuple((str(k), plain(v)) for k, v in content.items()))
            for title, content in (*shared, ("versions", results.versions))
            if content
        )
    )
    lead = f"The comparison took {duration(results.seconds)} in total. To run it again:"
    command = Listing(results.command, "bash")
    return Section("about", "About this comparison", (Text(lead), command, tables, strategies_table(standings)))


def strategies_table(standings: Sequence[Standing]) -> Table:
    """The description and paper of each strategy."""
    known = strategies()
    rows: list[tuple[str | Link, ...]] = []
    for name in dict.fromkeys(
        str(config.get("ft_type")) for standing in standings for config in standing.contender.configs
    ):
        config = known.get(name)
        if config is None:
            rows.append((name, "a custom strategy", NONE))
            continue
        summary = (config.__doc__ or "").strip().splitlines()[0]
        rows.append((name, summary, _cited(config.paper)))
    return Table("Strategies", ("strategy", "summary", "paper"), tuple(rows))


def _cited(paper: Paper | None) -> str | Link:
    if paper is None:
        return NONE
    text = f"{paper.authors}. {paper.title}. {paper.venue}"
    return Link(text, paper.url) if paper.url.startswith("https://") else text
