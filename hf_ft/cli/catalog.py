"""``hf-ft list`` and ``hf-ft describe``: the strategies as text, without heavy imports."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ft.cli.console import Parser, say, table
from hf_ft.errors import OptionError, unknown

FILE = Path(__file__).with_name("catalogue.json")
SOURCES = "Sources of defaults: code = read in the authors' code, paper = stated there, ours = chosen here."


@dataclass(frozen=True)
class Entry:
    """The description of a strategy; all values are text.

    Attributes:
        options: for each option ``name``, ``default``, ``source``, ``type``, ``range`` (may be empty) and ``help``.
        recommended: for each training argument ``name``, ``value`` and ``source``.
    """

    name: str
    summary: str
    cls: str
    papers: list[str]
    short_paper: str
    formula: str
    options: list[dict[str, str]]
    recommended: list[dict[str, str]]


def run_list(arguments: list[str]) -> None:
    """Print all strategies with name, paper and description."""
    parser = Parser(prog="hf-ft list", description="List all strategies: name, what each does, and its paper.")
    parser.parse_args(arguments)
    rows = [
        (entry.name, f"{entry.summary} ({entry.short_paper})" if entry.short_paper else entry.summary)
        for entry in entries().values()
    ]
    say(table(rows, ("strategy", "what it does")))
    say("\n`hf-ft describe NAME` shows a strategy's formula and options; `hf-ft train --strategy NAME` uses it.")
    say("Strategies compose: give --strategy several times (at most one of them may decide what trains when).")


def run_describe(arguments: list[str]) -> None:
    """Print the full description of one strategy."""
    parser = Parser(prog="hf-ft describe", description="Show a strategy's paper, formula, options and defaults.")
    parser.add_argument("name", help="a name from `hf-ft list`")
    name, known = parser.parse_args(arguments).name, entries()
    if name not in known:
        raise OptionError(unknown("strategy", name, known))
    say(describe(known[name]))


def entries() -> dict[str, Entry]:
    """Our strategies from the file written by docs/tools/tables.py, and any others registered in this process."""
    content: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    found = {values["name"]: Entry(**values) for values in content}
    if "hf_ft.core.config" in sys.modules:  # the import takes seconds; before it, nothing else can be registered
        live = importlib.import_module("hf_ft.cli.entries").entries()
        found |= {name: entry for name, entry in live.items() if name not in found}
    return found


def describe(entry: Entry) -> str:
    """A strategy as a page of text: its own options first, then the common ones."""
    head = [("class", entry.cls)]
    head += [("paper" if i == 0 else "see also", paper) for i, paper in enumerate(entry.papers)]
    head += [("formula", entry.formula)] if entry.formula else []
    lines = [f"{entry.name}: {entry.summary}", "", table(head), "", "options"]
    for option in entry.options:
        limits = f" in {option['range']}" if option["range"] else ""
        default = f"default {option['default']} ({option['source']})"
        lines.append(f"  --{entry.name}.{option['name']}   {default}; {option['type']}{limits}")
        lines.append(table([("", option["help"])], indent="    "))
    lines += ["", "recommended training arguments (used by `hf-ft train` unless you set them)"]
    wanted = [f"  {one['name']} = {one['value']}   ({one['source']})" for one in entry.recommended]
    return "\n".join([*lines, *(wanted or ["  none"]), "", SOURCES])
