"""What the winner of a comparison gained over full fine-tuning."""

from __future__ import annotations

from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import standings


def gain(results: Results) -> tuple[float, float | None] | None:
    """What the winner gained over full fine-tuning on test, and its standard error; None if it is the winner."""
    difference = next((s.differences.get("test") for s in standings(results) if s.name == results.winner), None)
    if difference is None:
        return None
    return difference.mean, None if difference.uncertainty is None else difference.uncertainty.error
