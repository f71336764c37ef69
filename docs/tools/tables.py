"""The generated places of README.md and docs/: tables of strategies and options, help texts, the API reference; and
hf_ft/cli/catalogue.json, what ``hf-ft list`` and ``hf-ft describe`` show.

    python -m docs.tools.tables             rewrite them all
    python -m docs.tools.tables --check     exit with 1 and name the files that are out of date

A place is what stands between ``<!-- begin: NAME arguments -->`` and ``<!-- end -->``; NAME is a key of ``PLACES``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hf_ft
from docs.tools.measured import (
    table_of_disentangling,
    table_of_frozen,
    table_of_regularisers,
    table_of_soft,
    table_of_step_times,
    table_of_steps,
)
from docs.tools.measured import table_of_strategies as table_of_measured
from docs.tools.results import table_of_advice, table_of_all, table_of_choice, table_of_five, table_of_task
from hf_ft.cli.catalog import FILE as CATALOGUE
from hf_ft.cli.entries import as_file
from hf_ft.core.config import _CONFIGS, FTConfig, Paper, config_class, strategies
from hf_ft.core.options import annotation, describe_type, options
from hf_ft.core.search_space import Choice, LogRange

ROOT = Path(__file__).parents[2]
_PLACE = re.compile(r"(<!-- begin: (\w+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.S)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Reference):", re.M)
SOURCES = "Source of a default: `code` = read in the authors' code, `paper` = stated there, `ours` = chosen here."


def documented() -> dict[str, type[FTConfig]]:
    """The strategies of this package; a test or a user may have registered others."""
    return {name: kind for name, kind in strategies().items() if kind.__module__.startswith("hf_ft.strategies.")}


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and every page of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def generated() -> list[Path]:
    """All files that are generated or have generated places."""
    return [CATALOGUE, *pages()]


def rendered(page: Path) -> str:
    """A file's text with its generated places made anew."""
    if page == CATALOGUE:
        return as_file(documented())

    def fill(match: re.Match[str]) -> str:
        content = PLACES[match[2]](page, *match[3].split())
        return f"{match[1]}\n{content.strip()}\n\n{match[4]}"

    return _PLACE.sub(fill, page.read_text(encoding="utf-8"))


# --- strategies and options -------------------------------------------------------------------------------


def table_of_strategies(page: Path) -> str:
    """Name with a link to its page, what it does, and where from."""
    folder = ROOT / "docs" / "methods"
    rows = []
    for name, kind in documented().items():
        link = Path(os.path.relpath(folder / f"{name}.md", page.parent)).as_posix()
        rows.append((f"[`{name}`]({link})", _summary(kind), _source(kind.paper)))
    return _table(("strategy", "what it does", "paper"), rows)


def about(page: Path, name: str) -> str:
    """The head of a strategy's page: config class, paper, formula."""
    kind = config_class(name)
    paper = f"Paper: {kind.paper}" if kind.paper else "No paper: this is a common baseline."
    return f"{_summary(kind)}\n\nConfig: `hf_ft.{kind.__name__}`, name `{name}`. {paper}\n\n{_fence(kind.formula)}"


def table_of_options(page: Path, name: str | None = None) -> str:
    """A strategy's own options and its recommended arguments; without a name, the options common to all."""
    kind = config_class(name) if name else FTConfig
    own = [field for field in options(kind) if field.name in kind.__annotations__]
    rows = [(f"`{f.name}`", f"`{f.default}`", _allowed(kind, f), f.metadata["source"], f.metadata["help"]) for f in own]
    parts = [_table(("option", "default", "values", "source", "meaning"), rows)] if own else ["It has none of its own."]
    if own:
        parts.append(SOURCES)
    if kind.recommended:
        wanted = ", ".join(f"`{key}={r.value}` ({r.source})" for key, r in kind.recommended.items())
        parts.append(f"Recommended training arguments: {wanted}.")
    return "\n\n".join(parts)


def table_of_tuned(page: Path) -> str:
    """What a comparison tunes of each strategy beside the learning rate."""
    rows = []
    for name, kind in documented().items():
        defaults = {field.name: field.default for field in options(kind)}
        link = f"[`{name}`](methods/{name}.md)"
        rows += [(link, f"`{o}`", _range(part), f"`{defaults[o]}`") for o, part in kind.tuned.items()]
        rows += [] if kind.tuned else [(link, "", "", "")]
    return _table(("strategy", "option", "values", "default, in the first trial"), rows)


def table_of_laws(page: Path) -> str:
    """The laws that ``hf_ft.testing`` checks."""
    from hf_ft.testing import LAWS

    rows = [(f"`{name}`", _markdown(_paragraphs(law)[0])) for name, law in LAWS.items()]
    return _table(("law", "what it says"), rows)


def _summary(kind: type) -> str:
    return _markdown(_paragraphs(kind)[0])


def _source(paper: Paper | None) -> str:
    if paper is None:
        return ""
    authors = paper.authors.split(", ")
    short = " and ".join(authors) if len(authors) < 3 else f"{authors[0]} et al."
    return f"[{short}, {paper.venue}]({paper.url})"


def _allowed(kind: type, field: dataclasses.Field) -> str:
    text = describe_type(annotation(kind, field.name)).replace('"', "`")
    return text + (f" in {field.metadata['range']}" if field.metadata["range"] else "")


def _range(part: LogRange | Choice) -> str:
    if isinstance(part, LogRange):
        return f"{part.low:g} to {part.high:g}, logarithmic"
    return ", ".join(f"`{value}`" for value in part.values)


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


def api(page: Path, module: str, *names: str) -> str:
    """Every public name that a module defines, in the order of its source.

    Public is what ``names`` says; without them the module's own ``__all__``, or that of ``hf_ft``.
    """
    home = importlib.import_module(module)
    public = names or vars(home).get("__all__", hf_ft.__all__)
    things = {name: thing for name, thing in vars(home).items() if name in public and thing.__module__ == module}
    ordered = sorted(things.items(), key=lambda item: inspect.getsourcelines(item[1])[1])
    return "\n\n".join(_entry(name, thing) for name, thing in ordered)


def table_of_configs(page: Path) -> str:
    """The config classes of the strategies, with a link to each one's page."""
    rows = [(f"`{kind.__name__}`", f"[`{name}`](methods/{name}.md)") for name, kind in documented().items()]
    return _table(("class", "options and page"), rows)


def _entry(name: str, thing: Any) -> str:
    parts = [f"### {name}", _fence(_signature(name, thing)), *map(_markdown, _paragraphs(thing)), _details(thing)]
    parts += [
        f"`{_signature('.' + method, function, width=10_000)}`: {_markdown(_paragraphs(function)[0])}"
        for method, function in _methods(thing)
    ]
    return "\n\n".join(part for part in parts if part)


def _methods(thing: Any) -> Iterator[tuple[str, Any]]:
    """A class's own public methods and properties that have a docstring."""
    if not inspect.isclass(thing):
        return
    for name, member in vars(thing).items():
        function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, member if isinstance(member, property) else function


class _Verbatim:
    """An annotation that shows as it stands in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(name: str, thing: Any, width: int = 90) -> str:
    if isinstance(thing, property):
        return name
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return f"{name}(ValueError)"
    signature = inspect.signature(thing)

    def shown(note: Any) -> Any:
        if note is signature.empty or note is None:
            return note
        return _Verbatim(re.sub(r"\b\w+(?:\.\w+)*\.(?=[A-Z])", "", _annotation(note)))

    parameters = [p.replace(annotation=shown(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
    returns = signature.empty if inspect.isclass(thing) else shown(signature.return_annotation)
    line = name + str(signature.replace(parameters=parameters, return_annotation=returns))
    if len(line) <= width:
        return line
    tail = "" if returns is signature.empty else f" -> {returns}"
    shown_parameters: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(p.startswith("*") for p in shown_parameters):
            shown_parameters.append("*")
        shown_parameters.append(str(parameter))
    return "\n".join([f"{name}(", *(f"    {p}," for p in shown_parameters), f"){tail}"])


def _annotation(note: Any) -> str:
    return note if isinstance(note, str) else inspect.formatannotation(note)


def _paragraphs(thing: Any) -> list[str]:
    """What a docstring says before its first section and its formula."""
    doc = _SECTION.split((inspect.getdoc(thing) or "").strip())[0]
    found = [" ".join(paragraph.split()) for paragraph in doc.split("\n\n")]
    return [text for text in found if text and not text.startswith(".. math::")]


def _details(thing: Any) -> str:
    """The sections of a docstring as lists."""
    parts = _SECTION.split((inspect.getdoc(thing) or "").strip())[1:]
    shown = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        items = re.split(r"\n(?=    \S)", "\n" + body.strip("\n")) if body.startswith("\n") else [body]
        lines = [_item(" ".join(item.split()), title) for item in items if item.strip()]
        shown.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join(shown)


def _item(text: str, title: str) -> str:
    name, colon, rest = text.partition(": ")
    named = colon and title != "Returns" and re.fullmatch(r"[\w*, ]+", name)
    return f"- `{name}`: {_markdown(rest)}" if named else f"- {_markdown(text)}"


def _markdown(text: str) -> str:
    """Docstrings are reStructuredText: roles and double backticks become code."""
    text = re.sub(r":math:`([^`]*)`", lambda m: f"`{_plain_formula(m[1])}`", text)
    text = re.sub(r":(?:class|func|meth|mod):`~?(?:hf_ft\.(?:\w+\.)*)?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def _plain_formula(text: str) -> str:
    return re.sub(r"\\text\{([^}]*)\}", r"\1", text).replace("\\cdot", "·").replace("\\", "")


PLACES: dict[str, Callable[..., str]] = {
    "strategies": table_of_strategies,
    "about": about,
    "options": table_of_options,
    "tuned": table_of_tuned,
    "help": help_text,
    "api": api,
    "configs": table_of_configs,
    "laws": table_of_laws,
    "steps": lambda page: table_of_steps(_table),
    "step_times": lambda page: table_of_step_times(_table),
    "frozen": lambda page: table_of_frozen(_table),
    "regularisers": lambda page: table_of_regularisers(_table),
    "soft": lambda page: table_of_soft(_table),
    "disentangling": lambda page: table_of_disentangling(_table),
    "measured": lambda page, name: table_of_measured(_table, name),
    "results": lambda page: table_of_all(_table),
    "results_of": lambda page, task: table_of_task(_table, task),
    "results_five": lambda page: table_of_five(_table),
    "results_choice": lambda page: table_of_choice(_table),
    "results_advice": lambda page: table_of_advice(_table),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args().check
    if not (ROOT / "docs").is_dir():
        raise SystemExit("there is no docs folder beside the package: run this from a clone.")
    stale = 0
    for page in generated():
        text = rendered(page)
        if not page.exists() or text != page.read_text(encoding="utf-8"):
            stale += 1
            print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'is rewritten'}")
            if not check:
                page.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
