"""How good an advised order was, once the strategies' scores are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_ft.advice.rules import neutral_order
from hf_ft.core.config import BASELINE

__all__ = ["expected_best", "how_often_right", "judged_table", "summary"]

FIRST = (1, 3, 5)  # how many of an order are tried


def fixed_order() -> tuple[str, ...]:
    """What one would try without any advice: the baseline first, then the cheaper."""
    return tuple(dict.fromkeys((BASELINE, *neutral_order())))


def how_often_right(results: Iterable[Mapping[str, Any]], fixed: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Judge the advice on tasks whose scores are known.

    The regret of an order after its first k strategies is the best score of all minus the best of these k: what is lost
    by trying no more than k. Only strategies that have a score count; of equally good ones the best placed is the best.

    Args:
        results: for each task ``task``, ``advice`` (the order), ``scores`` (by strategy, the mean score on test data,
            higher is better) and ``full_std`` (of full fine-tuning over the seeds; may be missing).
        fixed: an order without advice, to compare with; None for the baseline and then the cheaper first.

    Returns:
        For each task ``task``, ``strategies`` (how many), ``best``, ``rank`` (its place in the advised order, from 1),
        ``in_top_3``, ``full_std``, and for k = 1, 3, 5 ``regret_k`` of the advice, ``random_k``, the expectation over
        all orders alike, and ``fixed_k``.

    Raises:
        ValueError: a task without scores, or with one for a strategy that the advice does not name.
    """
    order = fixed_order() if fixed is None else fixed
    return [_judged(result, order) for result in results]


def _judged(result: Mapping[str, Any], fixed: Sequence[str]) -> dict[str, Any]:
    scores: Mapping[str, float] = result["scores"]
    unplaced = sorted(set(scores) - set(result["advice"]))
    if not scores or unplaced:
        what = f"scores of {', '.join(unplaced)}, which the advice does not name" if unplaced else "no scores"
        raise ValueError(f"task {result['task']!r} has {what}: give the whole order, and a score or more.")
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
    """Over the tasks: the share whose best is advised first and among the first three, and the mean of each regret."""
    if not rows:
        raise ValueError("no task to judge: run the comparison first.")
    kinds = [f"{kind}_{k}" for kind in ("regret", "random", "fixed") for k in FIRST]
    shares = {"first": [row["rank"] == 1 for row in rows], "in_top_3": [row["in_top_3"] for row in rows]}
    values = shares | {kind: [row[kind] for row in rows] for kind in kinds}
    return {name: sum(found) / len(rows) for name, found in values.items()}


def judged_table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers, and a row of text for each task and for their mean, of what :func:`how_often_right` returned."""
    after = ", ".join(map(str, FIRST))
    kinds = {"regret": "as advised", "random": "in random order", "fixed": "the baseline, then the cheaper first"}
    headers = ("task", "best", "its place", *(f"lost after {after}: {text}" for text in kinds.values()), "std of full")

    def lost(row: Mapping[str, Any]) -> list[str]:
        return [", ".join(f"{row[f'{kind}_{k}']:.3f}" for k in FIRST) for kind in kinds]

    shown: list[tuple[str, ...]] = []
    for row in rows:
        std = "" if row["full_std"] is None else f"{row['full_std']:.3f}"
        shown.append((row["task"], row["best"], f"{row['rank']} of {row['strategies']}", *lost(row), std))
    total = summary(rows)
    first = f"first {100 * total['first']:.0f} %, in the first three {100 * total['in_top_3']:.0f} %"
    return headers, [*shown, ("mean", "", first, *lost(total), "")]
