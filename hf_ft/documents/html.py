"""Render a document as a self-contained HTML page: no scripts, fonts or images from elsewhere."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_ft.documents import svg
from hf_ft.documents.document import Document, Link, Picture, Table
from hf_ft.documents.text import NONE, PLUS_MINUS, code_parts

NARROW = 3  # columns; wider tables scroll horizontally on a small screen
_NUMBER = r"[+\u2212-]?\d[\d.,]*(e[+-]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}({PLUS_MINUS}{_NUMBER})?%?|\[{_NUMBER}, {_NUMBER}\]|\d+( / \d+)+|{NONE}|baseline")


def html(document: Document) -> str:
    """Render the whole page. All text of the document is escaped."""
    environment = Environment(
        loader=PackageLoader("hf_ft.documents", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": inline}
    environment.tests |= {
        "link": lambda cell: isinstance(cell, Link),
        "picture": lambda cell: isinstance(cell, Picture),
    }
    environment.globals |= {
        "chart": lambda chart, name: Markup(svg.svg(chart, name)),
        "key_mark": lambda kind, bar: Markup(svg.key_mark(kind, bar)),
        "numeric": numeric_columns,
        "narrow": NARROW,
    }
    return environment.get_template("report.html.jinja").render(document=document)


def inline(text: str) -> Markup:
    """Text as HTML, with backticks as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if is_code else escape(part) for is_code, part in code_parts(text)
    )


def numeric_columns(table: Table) -> list[bool]:
    """Whether each column holds only numbers, which are right-aligned; the first column holds names."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.headers)
    return [
        i > 0 and all(isinstance(cell, str) and _NUMBERS.fullmatch(cell) is not None for cell in cells)
        for i, cells in enumerate(columns)
    ]
