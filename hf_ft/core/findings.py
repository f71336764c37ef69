"""What a strategy has to show of what it measured: in the report, in the model card and on the command line."""

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
    """What a strategy found in the data, for people.

    Attributes:
        summary: a sentence or two, for the model card and the report.
        blocks: text, tables and figures for the report.
        short: text and tables for the terminal; the model card shows those of the tables that have headers.
        files: contents by file name, to be written beside the model: a text as it is, all else as JSON.
        plots: functions by file name that draw a picture into a path; called only where matplotlib is installed.
    """

    summary: str = ""
    blocks: tuple[Block, ...] = ()
    short: tuple[Text | Table, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    plots: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)

    def write(self, folder: str | Path) -> list[str]:
        """Write the files and, where matplotlib is installed, the plots into a folder; returns their names."""
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
