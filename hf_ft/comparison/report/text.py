"""Formats the numbers and names of a comparison."""

from __future__ import annotations

from hf_ft.comparison.statistics import Difference, Spread
from hf_ft.documents.text import NONE, PLUS_MINUS, score, score_like, signed

SPLIT_NAMES = {"validation": "validation", "test": "test", "ood": "out of distribution"}


def spread(found: Spread | None) -> str:
    """Mean and standard deviation over seeds."""
    if found is None:
        return NONE
    return score(found.mean) + ("" if found.std is None else f"{PLUS_MINUS}{score_like(found.std)}")


def interval(found: Difference) -> str:
    """``[+0.008, +0.034]``."""
    return NONE if found.interval is None else f"[{signed(found.interval[0])}, {signed(found.interval[1])}]"


def seeds(n: int) -> str:
    return f"{n} seeds" if n > 1 else "one seed"


def against_full(found: Difference) -> str:
    """A paired difference as a sentence."""
    tally = f"better on {found.wins}, equal on {found.ties}, worse on {found.losses} of {seeds(len(found.by_seed))}"
    if found.interval is None:
        return f"{signed(found.mean)} (one seed, so no interval)"
    return f"{signed(found.mean)}, 95 % interval {interval(found)} ({tally})"
