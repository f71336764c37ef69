"""Matplotlib figures, where matplotlib is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(who: str, width: float = 9, height: float = 3.5) -> Figure:
    """Create an empty figure without touching global state.

    Args:
        who: what needs the figure, for the error message.
        width: width in inches.
        height: height in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, which would set a backend for the whole process
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install 'hf-ft[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")
