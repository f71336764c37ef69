"""Figures to draw on, for those who have matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(who: str, width: float = 9, height: float = 3.5) -> Figure:
    """An empty figure; nothing global is touched.

    Args:
        who: wants to draw, for the message.
        width: in inches.
        height: in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install 'hf-ft[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")
