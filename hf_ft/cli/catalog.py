"""``hf-ft list`` and ``hf-ft describe``: what the registry knows, as text."""

from __future__ import annotations

from hf_ft.cli.console import Parser, say, table
from hf_ft.core.config import FTConfig, config_class, strategies
from hf_ft.core.options import annotation, describe_type, options

SOURCES = "Sources of defaults: code = read in the authors' code, paper = stated there, ours = chosen here."


def run_list(arguments: list[str]) -> None:
    """Print all strategies: name, what it does, where from."""
    parser = Parser(prog="hf-ft list", description="List all strategies: name, what each does, and its paper.")
    parser.parse_args(arguments)
    rows = [(name, one_liner(config), _short_paper(config)) for name, config in strategies().items()]
    # What it does is the long column: it goes last, where it is wrapped.
    say(table([(name, paper, what) for name, what, paper in rows], ("strategy", "paper", "what it does")))
    say("\n`hf-ft describe NAME` shows a strategy's formula and options; `hf-ft train --strategy NAME` uses it.")
    say("Strategies compose: give --strategy several times (at most one of them may decide what trains when).")


def run_describe(arguments: list[str]) -> None:
    """Print all there is to know about one strategy."""
    parser = Parser(prog="hf-ft describe", description="Show a strategy's paper, formula, options and defaults.")
    parser.add_argument("name", help="a name from `hf-ft list`")
    say(describe(config_class(parser.parse_args(arguments).name)))


def one_liner(config: type[FTConfig]) -> str:
    """The first line of the class's docstring, without its full stop."""
    return (config.__doc__ or "").strip().splitlines()[0].rstrip(".")


def describe(config: type[FTConfig]) -> str:
    """A strategy as a page of text; its own options come first, those of all strategies after."""
    lines = [f"{config.ft_type}: {one_liner(config)}", ""]
    module = config.__module__
    head = [("class", f"{'hf_ft' if module.startswith('hf_ft.') else module}.{config.__name__}")]
    head += [("paper", str(config.paper))] if config.paper else []
    head += [("formula", config.formula)] if config.formula else []
    lines += [table(head), "", "options"]
    for field in options(config):
        kind = describe_type(annotation(config, field.name))
        limits = f" in {field.metadata['range']}" if field.metadata["range"] else ""
        default = f"default {field.default} ({field.metadata['source']})"
        lines.append(f"  --{config.ft_type}.{field.name}   {default}; {kind}{limits}")
        lines.append(table([("", field.metadata["help"])], indent="    "))
    lines += ["", "recommended training arguments (used by `hf-ft train` unless you set them)"]
    wanted = [f"  {name} = {r.value}   ({r.source})" for name, r in config.recommended.items()]
    return "\n".join([*lines, *(wanted or ["  none"]), "", SOURCES])


def _short_paper(config: type[FTConfig]) -> str:
    if config.paper is None:
        return "-"
    authors = [name.strip() for name in config.paper.authors.split(",")]
    others = " et al." if len(authors) > 2 else f" and {authors[1]}" if len(authors) == 2 else ""
    return f"{authors[0]}{others}, {config.paper.venue}"
