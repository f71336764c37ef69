"""Writing a report: ``results.json``, ``report.html`` and ``report.md``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hf_ft.comparison.report.build import document
from hf_ft.comparison.results import Results
from hf_ft.documents.html import html
from hf_ft.documents.markdown import markdown


def write_report(results: Results, folder: Path) -> None:
    """Write the results, the page and its Markdown into a folder, each as a whole or not at all.

    Args:
        results: what was found.
        folder: where to; it is made if it is not there.
    """
    # The texts are made before anything is written: a page that cannot be made leaves an old report as it is.
    content = document(results)
    page, text = html(content), markdown(content)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "results.json", results.save)
    _replace(folder / "report.html", lambda file: _write(file, page))
    _replace(folder / "report.md", lambda file: _write(file, text))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Write beside the file, then put it in its place."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
