"""Contents of a report: sections of text, tables and charts, which Markdown and HTML render differently.

In all texts, backticks enclose code; see :func:`hf_ft.documents.text.code`.
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
    """A block of code, or a command."""

    text: str
    language: str


@dataclass(frozen=True)
class Link:
    """A table cell that links elsewhere."""

    text: str
    address: str


@dataclass(frozen=True)
class Picture:
    """A table cell with a small picture above its text; Markdown shows the text alone.

    Attributes:
        address: a data URI: pages load nothing.
    """

    text: str
    address: str


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is the row's name.

    Attributes:
        caption: caption of the table.
        headers: column headers.
        rows: cells as text.
        strong: indices of the rows to emphasise.
        shades: darkness of each cell by row and column, 0 to 1; for a table that is read as a picture.
        folded: whether the table is collapsed by default.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str | Link | Picture, ...], ...]
    strong: frozenset[int] = frozenset()
    shades: tuple[tuple[float, ...], ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Tables:
    """Small tables, side by side where space permits."""

    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Figure:
    """Charts side by side, with the underlying numbers.

    Attributes:
        caption: what the charts show, and how to read them.
        charts: one large chart, or several small ones.
        table: the numbers.
        key: legend: kind of mark (:data:`hf_ft.documents.chart.KINDS`) and its meaning.
    """

    caption: str
    charts: tuple[Chart, ...]
    table: Table
    key: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


Block = Text | Bullets | Listing | Table | Tables | Figure | Heading


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        name: anchor for links to it; letters only.
        title: heading of the section.
        blocks: content of the section.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        kind: what it is, above the title.
        made_by: the command that wrote it.
        data: name of the file with the same figures as JSON.
        text: name of the file with the same content as Markdown.
    """

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    kind: str = "Comparison of fine-tuning strategies"
    made_by: str = "hf-ft compare"
    data: str = "results.json"
    text: str = "report.md"
