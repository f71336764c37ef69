"""Writes the report: ``results.json``, ``report.html`` and ``report.md``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hf_ft.comparison.report.build import document
from hf_ft.comparison.results import Results
from hf_ft.documents.html import html
from hf_ft.documents.markdown import markdown


def write_report(results: Results, folder: Path) -> None:
    """Write the results, the HTML page and its Markdown to a folder, each file atomically.

    Args:
        results: the results to report.
        folder: the output folder; created if necessary.
    """
    # Generate all texts before writing anything, so that an error leaves an existing report intact.
    content = document(results)
    page, text = html(content), markdown(content)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "results.json", results.save)
    _replace(folder / "report.html", lambda file: _write(file, page))
    _replace(folder / "report.md", lambda file: _write(file, text))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary file, then move it into place."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
