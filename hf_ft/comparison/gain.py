"""The winner's gain over full fine-tuning in a comparison."""

from __future__ import annotations

from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import paired_differences
from hf_ft.core.config import BASELINE


def gain(results: Results, over: str = BASELINE) -> tuple[float, float | None] | None:
    """The winner's gain over another contender on test, and its standard error; None if they share no scores."""
    named = {contender.name: contender for contender in results.contenders}
    if results.winner == over or not {results.winner, over} <= set(named):
        return None
    difference = paired_differences(results, named[results.winner], named[over]).get("test")
    if difference is None:
        return None
    return difference.mean, None if difference.uncertainty is None else difference.uncertainty.error
