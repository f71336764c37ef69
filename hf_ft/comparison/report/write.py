"""Writes the report: ``results.json``, ``report.html`` and ``report.md``."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from hf_ft.comparison.report.build import document
from hf_ft.comparison.results import Results
from hf_ft.documents.html import html
from hf_ft.documents.markdown import markdown
from hf_ft.processes import is_gone, process_name

A_DAY = 24 * 3600  # seconds; longer than any file takes to write
_TEMPORARY = re.compile(r"([0-9a-f]{12}-)?\d+(-\d+)?")


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
    _remove_stale(file)
    temporary = file.with_name(f".{file.name}.{process_name()}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(file: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    for temporary in file.parent.glob(f".{glob.escape(file.name)}.*"):
        name = temporary.name.removeprefix(f".{file.name}.")
        with contextlib.suppress(FileNotFoundError):  # another process removes it as well, or moves it into place
            if is_gone(name) or (_TEMPORARY.fullmatch(name) and time.time() - temporary.stat().st_mtime > A_DAY):
                temporary.unlink()
