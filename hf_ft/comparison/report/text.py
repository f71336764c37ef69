"""Formats the numbers and names of a comparison."""

from __future__ import annotations

from hf_ft.comparison.statistics import Difference, Spread
from hf_ft.documents.text import NONE, PLUS_MINUS, score, score_like, signed

SPLIT_NAMES = {"validation": "validation", "test": "test", "ood": "out of distribution"}


def spread(value: Spread | None) -> str:
    """Mean and standard deviation over seeds."""
    if value is None:
        return NONE
    return score(value.mean) + ("" if value.std is None else f"{PLUS_MINUS}{score_like(value.std)}")


def interval(difference: Difference) -> str:
    """``[+0.008, +0.034]``."""
    return (
        NONE if difference.interval is None else f"[{signed(difference.interval[0])}, {signed(difference.interval[1])}]"
    )


def seeds(n: int) -> str:
    return f"{n} seeds" if n > 1 else "one seed"


def against_full(difference: Difference) -> str:
    """A paired difference as a sentence."""
    if difference.interval is None:
        return f"{signed(difference.mean)} (one seed, so no interval)"
    tally = (
        f"better on {difference.wins}, equal on {difference.ties}, worse on {difference.losses} of "
        f"{seeds(len(difference.by_seed))}"
    )
    return f"{signed(difference.mean)}, 95 % interval {interval(difference)} ({tally})"
