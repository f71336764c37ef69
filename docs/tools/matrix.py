"""The tables of docs/models.md, made from what docs/tools/models.py wrote to docs/results/models.jsonl."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from docs.tools.models import Row, names_of_strategies, read
from hf_ft.testing.families import UNBUILDABLE, families

NOT_YET = "Not measured yet."
SIGNS = {"works": "✓", "refused": "r", "transformers": "t", "wrong": "w"}
TOLD = {"refused": "refused", "transformers": "fault in Transformers", "wrong": "wrong"}
LIKE = 50  # characters in which reasons of one kind agree
SHOWN = 220
Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]
Kind = tuple[str, str]


def kind_of(row: Row) -> Kind:
    """The outcome, and the reason without what is specific to one class: names, numbers, shapes."""
    text = re.sub(r"^(members\.\d+: |\w+: )", "", row.get("reason", ""))
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\b\w+For\w+|\b\w+(\.\w+)+|\b[\d.,e+-]+\b", "…", text)
    return row["outcome"], re.sub(r"(…[ ,]*)+", "…", text)[:LIKE]


def codes(rows: Iterable[Row]) -> dict[Kind, str]:
    """A short name for every kind of outcome except success, frequent kinds first."""
    counts = Counter(kind_of(row) for row in rows if row["outcome"] != "works")
    numbers: Counter[str] = Counter()
    named = {}
    for kind, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        numbers[kind[0]] += 1
        named[kind] = f"{SIGNS[kind[0]]}{numbers[kind[0]]}"
    return named


def table_of_models(table: Table, task: str) -> str:
    """One task: a row per class, a column per strategy."""
    rows = read()
    if not rows:
        return NOT_YET
    named = codes(rows.values())
    lines = []
    for model in (name for name, its in families().items() if its == task):
        cells = [rows.get((model, strategy)) for strategy in names_of_strategies()]
        lines.append((f"`{model}`", *(_sign(cell, named) for cell in cells)))
    return table(("class", *(f"`{name}`" for name in names_of_strategies())), lines)


def table_of_reasons(table: Table) -> str:
    """What each short name means: how many cells and classes it occurs in, and the message of one of them."""
    rows = list(read().values())
    if not rows:
        return NOT_YET
    by_kind: dict[Kind, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(kind_of(row), []).append(row)
    lines = []
    for kind, code in sorted(codes(rows).items(), key=lambda pair: (list(SIGNS).index(pair[0][0]), int(pair[1][1:]))):
        members = by_kind[kind]
        lines.append((code, str(len(members)), str(len({row["model"] for row in members})), _example(members)))
    return table(("", "cells", "classes", "example"), lines)


def summary(table: Table) -> str:
    """The number of cells with each outcome, by task; and the classes that are left out."""
    rows = list(read().values())
    if not rows:
        return NOT_YET
    tasks = families()
    lines = []
    for task in dict.fromkeys(tasks.values()):
        counts = Counter(row["outcome"] for row in rows if tasks.get(row["model"]) == task)
        classes = sum(its == task for its in tasks.values())
        lines.append((task, str(classes), *(str(counts[outcome]) for outcome in SIGNS)))
    counts = Counter(row["outcome"] for row in rows)
    lines.append(("all", str(len(tasks)), *(str(counts[outcome]) for outcome in SIGNS)))
    versions = ", ".join(sorted({row["transformers"] for row in rows}))
    left_out = "; ".join(f"`{name}` ({reason})" for name, reason in UNBUILDABLE.items())
    heads = ("data", "classes", "works", *(TOLD[outcome] for outcome in list(SIGNS)[1:]))
    return f"{table(heads, lines)}\n\nTransformers {versions}. Left out: {left_out}."


def _sign(cell: Row | None, named: Mapping[Kind, str]) -> str:
    if cell is None:
        return ""
    return SIGNS["works"] if cell["outcome"] == "works" else named[kind_of(cell)]


def _example(members: Sequence[Row]) -> str:
    """The shortest message, without the names of folders."""
    row = min(members, key=lambda one: (len(one["reason"]), one["model"]))
    reason = re.sub(r"/\S+/(\w+)", r"\1", row["reason"])
    short = reason if len(reason) <= SHOWN else reason[:SHOWN].rpartition(" ")[0] + " …"
    return f"`{row['model']}`, `{row['strategy']}`: {TOLD[row['outcome']]}: {_escaped(short)}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", text)
