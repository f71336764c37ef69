"""Render a document as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hf_ft.documents.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Heading,
    Link,
    Listing,
    Picture,
    Section,
    Table,
    Tables,
    Text,
)
from hf_ft.documents.text import code_parts

_SPECIAL, _SPACE = re.compile(r"[\\`*\[\]<>&|#]|(?<!\w)_|_(?!\w)"), re.compile(r"\s+")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def markdown(document: Document) -> str:
    """Render the whole document, with tables in place of charts."""
    parts = [f"# {escaped(document.title)}", escaped(f"{document.subtitle}."), *map(_section, document.sections)]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text on one line, with all markup escaped."""
    return _SPECIAL.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), _SPACE.sub(" ", text))


def inline(text: str) -> str:
    """Text as Markdown, with backticks kept as code."""
    parts = code_parts(" ".join(text.split()))
    return "".join(f"`{part}`" if is_code else escaped(part) for is_code, part in parts)


def blocks(shown: Iterable[Block]) -> str:
    """Render blocks on their own."""
    return "\n\n".join(map(_block, shown))


def _section(section: Section) -> str:
    return f"## {escaped(section.title)}\n\n{blocks(section.blocks)}"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return inline(text)
        case Bullets(items):
            return "\n".join(f"- {inline(item)}" for item in items)
        case Listing():
            return listing(block)
        case Heading(text):
            return f"### {escaped(text)}"
        case Table():
            return _folded(block) if block.folded else f"**{escaped(block.caption)}**\n\n{pipe_table(block)}"
        case Tables(tables):
            return blocks(tables)
        case Figure():
            return f"{inline(block.caption)}\n\n{_folded(block.table)}"


def _folded(table: Table) -> str:
    return f"<details><summary>{escaped(table.caption)}</summary>\n\n{pipe_table(table)}\n\n</details>"


def listing(block: Listing) -> str:
    longest = max(map(len, re.findall("`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{block.language}\n{block.text}\n{fence}"


def pipe_table(table: Table) -> str:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    for number in table.strong:
        rows[number] = [f"**{cell}**" for cell in rows[number]]
    return "\n".join(map(_row, [[*map(escaped, table.headers)], ["---"] * len(table.headers), *rows]))


def _cell(cell: str | Link | Picture) -> str:
    if isinstance(cell, Picture):
        return escaped(cell.text)
    return f"[{escaped(cell.text)}](<{cell.address}>)" if isinstance(cell, Link) else escaped(cell)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
