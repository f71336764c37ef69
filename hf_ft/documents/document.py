"""What a report is made of: sections of text, tables and charts, which Markdown and HTML show each in its own way.

In all texts, what stands between backticks is code; see :func:`hf_ft.documents.text.code`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_ft.documents.chart import Chart


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Code, or a command."""

    text: str
    language: str


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads elsewhere."""

    text: str
    address: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of each is its name.

    Attributes:
        caption: what it shows.
        headers: of the columns.
        rows: cells as text.
        strong: numbers of the rows that stand out.
        shades: by row and column, how dark a cell is, 0 to 1; for a table that is read as a picture.
        folded: whether it is only shown on demand.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str | Link, ...], ...]
    strong: frozenset[int] = frozenset()
    shades: tuple[tuple[float, ...], ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Tables:
    """Small tables, side by side where there is room."""

    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Figure:
    """Charts side by side, with their numbers.

    Attributes:
        caption: what they show, and how to read them.
        charts: one large, or several small ones.
        table: the numbers.
        key: kind of mark and what it stands for, of :data:`hf_ft.documents.chart.KINDS`.
    """

    caption: str
    charts: tuple[Chart, ...]
    table: Table
    key: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


Block = Text | Bullets | Listing | Table | Tables | Figure | Heading


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: for links to it; letters only.
        title: its heading.
        blocks: its content.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
