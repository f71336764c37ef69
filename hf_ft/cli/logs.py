"""Logging of the commands: notes of hf_ft in one format, libraries silenced except on the main process."""

from __future__ import annotations

import logging

import datasets
import transformers

from hf_ft.cli.console import is_main, say


class _Notes(logging.Handler):
    """Prints warnings of hf_ft, one per line; stderr is looked up each time, since a progress bar may replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}", error=True)


def quieten() -> None:
    """Print notes of hf_ft in one format, and silence the libraries on all but the main process."""
    logger = logging.getLogger("hf_ft")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.WARNING))
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not is_main():
        transformers.utils.logging.set_verbosity_error()
        datasets.logging.set_verbosity_error()
