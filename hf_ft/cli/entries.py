"""The contents of ``hf-ft list`` and ``hf-ft describe``, from the registered classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field, asdict

from hf_ft.cli.catalog import Entry
from hf_ft.core.config import FTConfig, strategies
from hf_ft.core.options import annotation, describe_type, options


def entries() -> dict[str, Entry]:
    """All registered strategies."""
    return {name: entry_of(kind) for name, kind in strategies().items()}


def as_file(kinds: Mapping[str, type[FTConfig]]) -> str:
    """The content of ``catalogue.json``."""
    content = [asdict(entry_of(kind)) for kind in kinds.values()]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def entry_of(kind: type[FTConfig]) -> Entry:
    """The description of one strategy."""
    return Entry(
        name=kind.ft_type,
        summary=(kind.__doc__ or "").strip().splitlines()[0].rstrip("."),
        cls=f"{'hf_ft' if kind.__module__.startswith('hf_ft.') else kind.__module__}.{kind.__name__}",
        papers=[str(paper) for paper in (kind.paper, *kind.further_papers) if paper],
        short_paper=kind.paper.short if kind.paper else "-",
        formula=kind.formula,
        options=[_option(kind, field) for field in options(kind)],
        recommended=[
            {"name": name, "value": str(wanted), "source": wanted.source} for name, wanted in kind.recommended.items()
        ],
    )


def _option(kind: type[FTConfig], field: Field) -> dict[str, str]:
    return {
        "name": field.name,
        "default": str(field.default),
        "source": field.metadata["source"],
        "type": describe_type(annotation(kind, field.name)),
        "range": field.metadata["range"] or "",
        "help": field.metadata["help"],
    }
