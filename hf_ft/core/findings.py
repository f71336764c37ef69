"""Findings of a strategy's measurement, for the report, the model card and the command line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ft.documents.document import Block, Figure, Table, Text

__all__ = ["Block", "Figure", "Findings", "Table", "Text"]


@dataclass(frozen=True)
class Findings:
    """A strategy's findings in the data, in readable form.

    Attributes:
        summary: a sentence or two, for the model card and the report.
        blocks: text, tables and figures for the report.
        short: text and tables for the terminal; the model card shows the tables that have headers.
        files: contents by file name, to be saved with the model: text verbatim, anything else as JSON.
        plots: functions by file name that draw a plot to a path; called only if matplotlib is installed.
    """

    summary: str = ""
    blocks: tuple[Block, ...] = ()
    short: tuple[Text | Table, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    plots: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)

    def write(self, folder: str | Path) -> list[str]:
        """Write the files and, if matplotlib is installed, the plots to a folder; return their names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            return list(self.files)
        for name, draw in self.plots.items():
            draw(folder / name)
        return [*self.files, *self.plots]
