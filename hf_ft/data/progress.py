"""Progress bars for reading data: on a terminal, and only if it takes long."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

DELAY = 2.0  # seconds until a bar is shown
_hidden = False


def hide_bars(hidden: bool = True) -> None:
    """Show no bars from now on in this process, as with ``disable_tqdm``."""
    global _hidden
    _hidden = hidden


def bar(what: str, total: int | None = None, **options: Any) -> tqdm:
    """A progress bar, which appears after two seconds and leaves nothing behind.

    Args:
        what: its title.
        total: number of steps, if it is known.
        options: options of tqdm.
    """
    # None: hidden if stderr is not a terminal
    return tqdm(desc=what, total=total, disable=_hidden or None, delay=DELAY, leave=False, **options)
