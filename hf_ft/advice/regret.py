"""Evaluate an advised order against the strategies' actual scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_ft.advice.rules import neutral_order
from hf_ft.core.config import BASELINE
from hf_ft.errors import OptionError

__all__ = ["expected_best", "how_often_right", "judged_table", "summary"]

FIRST = (1, 3, 5)  # number of strategies tried


def fixed_order() -> tuple[str, ...]:
    """The default order without advice: the baseline first, then by increasing cost."""
    return tuple(dict.fromkeys((BASELINE, *neutral_order())))


def how_often_right(results: Iterable[Mapping[str, Any]], fixed: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Evaluate the advice on tasks with known scores.

    The regret of an order at k is the best score overall minus the best score among its first k strategies: the loss
    from trying only k. Only strategies with a score count; ties for the best go to the one ranked highest.

    Args:
        results: for each task ``task``, ``advice`` (the order), ``scores`` (mean test score by strategy, higher is
            better) and ``full_std`` (standard deviation of full fine-tuning over the seeds; optional).
        fixed: a fixed order to compare with; None for the baseline first, then by increasing cost.

    Returns:
        For each task ``task``, ``strategies`` (their number), ``best``, ``rank`` (of the best in the advised order,
        from 1), ``in_top_3``, ``full_std``, and for k = 1, 3, 5 ``regret_k`` of the advice, ``random_k``, its
        expectation under a uniformly random order, and ``fixed_k``.

    Raises:
        OptionError: if a task has no scores, or has one for a strategy that the advice does not include.
    """
    order = fixed_order() if fixed is None else fixed
    return [_judged(result, order) for result in results]


def _judged(result: Mapping[str, Any], fixed: Sequence[str]) -> dict[str, Any]:
    scores: Mapping[str, float] = result["scores"]
    unplaced = sorted(set(scores) - set(result["advice"]))
    if not scores or unplaced:
        what = f"scores of {', '.join(unplaced)}, which the advice does not include" if unplaced else "no scores"
        raise OptionError(f"task {result['task']!r} has {what}: give the whole order, and at least one score.")
    order = [name for name in result["advice"] if name in scores]
    without = [name for name in fixed if name in scores]
    without += [name for name in scores if name not in without]
    highest = max(scores.values())
    best = next(name for name in order if scores[name] == highest)
    row = {"task": result["task"], "strategies": len(scores), "best": best, "rank": order.index(best) + 1}
    row |= {"in_top_3": row["rank"] <= 3, "full_std": result.get("full_std")}
    for k in FIRST:
        row[f"regret_{k}"] = highest - max(scores[name] for name in order[:k])
        row[f"random_{k}"] = highest - expected_best(list(scores.values()), k)
        row[f"fixed_{k}"] = highest - max(scores[name] for name in without[:k])
    return row


def expected_best(scores: Sequence[float], k: int) -> float:
    r"""The expected best of k of n scores drawn without replacement.

    In ascending order, the i-th is the best of :math:`\binom{i-1}{k-1}` of the :math:`\binom nk` draws.
    """
    k = min(k, len(scores))
    ways = [math.comb(place, k - 1) for place in range(len(scores))]
    return sum(way * score for way, score in zip(ways, sorted(scores), strict=True)) / math.comb(len(scores), k)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Averages over the tasks: how often the best is advised first or in the top three, and each mean regret."""
    if not rows:
        raise OptionError("no tasks to evaluate: run the comparison first.")
    kinds = [f"{kind}_{k}" for kind in ("regret", "random", "fixed") for k in FIRST]
    shares = {"first": [row["rank"] == 1 for row in rows], "in_top_3": [row["in_top_3"] for row in rows]}
    values = shares | {kind: [row[kind] for row in rows] for kind in kinds}
    return {name: sum(column) / len(rows) for name, column in values.items()}


def judged_table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Format the result of :func:`how_often_right`: headers, one row of text per task, and one for the mean."""
    after = ", ".join(map(str, FIRST))
    kinds = {"regret": "as advised", "random": "in random order", "fixed": "the baseline, then by cost"}
    headers = ("task", "best", "its rank", *(f"regret after {after}: {text}" for text in kinds.values()), "std of full")

    def lost(row: Mapping[str, Any]) -> list[str]:
        return [", ".join(f"{row[f'{kind}_{k}']:.3f}" for k in FIRST) for kind in kinds]

    shown: list[tuple[str, ...]] = []
    for row in rows:
        std = "" if row["full_std"] is None else f"{row['full_std']:.3f}"
        shown.append((row["task"], row["best"], f"{row['rank']} of {row['strategies']}", *lost(row), std))
    total = summary(rows)
    first = f"first {100 * total['first']:.0f} %, in the top three {100 * total['in_top_3']:.0f} %"
    return headers, [*shown, ("mean", "", first, *lost(total), "")]
