"""Shows the findings of a strategy's measurement on the command line and saves them to files."""

from __future__ import annotations

from pathlib import Path

from hf_ft.cli.console import is_main, say, table
from hf_ft.core.findings import Findings, Text


def show_findings(found: Findings, folder: Path) -> None:
    """Print the findings, save their files and, if matplotlib is installed, their plots."""
    if found.summary and not found.short:
        say(f"\n{found.summary}")
    for part in found.short:
        if isinstance(part, Text):
            say(f"\n{part.text}")
        else:
            say(f"\n{part.caption}:\n" if part.caption else "")
            say(table(part.rows, part.headers))
    if is_main() and (found.files or found.plots):
        say(f"\nIn {folder}: {', '.join(found.write(folder))}.")
