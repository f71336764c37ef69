"""Log messages of the commands: notes of hf_ft in one voice, the libraries silent on all but the main process."""

from __future__ import annotations

import logging

import datasets
import transformers

from hf_ft.cli.console import is_main, say


class _Notes(logging.Handler):
    """Warnings of hf_ft as a line each; stderr is looked up anew, since a progress bar may stand in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}", error=True)


def quieten() -> None:
    """Show notes of hf_ft in one voice, and keep the libraries on the other processes silent."""
    logger = logging.getLogger("hf_ft")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.WARNING))
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not is_main():
        transformers.utils.logging.set_verbosity_error()
        datasets.logging.set_verbosity_error()
