"""Atomic writing of files: readers never see part of one."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from hf_ft.processes import is_gone, process_name

A_DAY = 24 * 3600  # seconds; longer than any file takes to write
_TEMPORARY = re.compile(r"([0-9a-f]{12}-)?\d+(-\d+)?")


def write_whole(file: Path, text: str) -> None:
    """Write a text with Unix line endings."""
    replace_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def replace_whole(file: Path, write: Callable[[Path], object]) -> None:
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
        with contextlib.suppress(FileNotFoundError):  # another process also removes it, or moves it into place
            if is_gone(name) or (_TEMPORARY.fullmatch(name) and time.time() - temporary.stat().st_mtime > A_DAY):
                temporary.unlink()
