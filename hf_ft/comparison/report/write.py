"""Writes the report: ``results.json``, ``report.html`` and ``report.md``."""

from __future__ import annotations

from pathlib import Path

from hf_ft.comparison.report.build import document
from hf_ft.comparison.results import Results
from hf_ft.documents.files import replace_whole, write_whole
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
    replace_whole(folder / "results.json", results.save)
    write_whole(folder / "report.html", page)
    write_whole(folder / "report.md", text)
