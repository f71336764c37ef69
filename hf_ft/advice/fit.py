"""Fit the advice to finished comparisons, and evaluate it on tasks to which it was not fitted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from hf_ft.advice.evidence import Evidence, Gain
from hf_ft.advice.regret import FIRST
from hf_ft.advice.rules import neutral_order
from hf_ft.core.config import BASELINE

__all__ = ["Task", "advised_order", "fit", "judged_without"]

WORTHS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # of one rule point
LEVEL = 0.05


@dataclass(frozen=True)
class Task:
    """A finished comparison.

    Attributes:
        name: its name.
        scores: mean test score by strategy, with that of full fine-tuning; higher is better.
        points: rule points by strategy (:func:`hf_ft.advice.rules.rule_points`).
        data: where its samples come from. Tasks from the same data are held out together; empty for no other task's.
    """

    name: str
    scores: Mapping[str, float]
    points: Mapping[str, float]
    data: str = ""


def fit(tasks: Sequence[Task]) -> Evidence:
    """The mean gains, and the worth of a rule point that loses least on held-out tasks.

    Each task is held out in turn, with all others from the same data, and the regrets of trying the first 1, 3 and 5
    strategies on it are averaged. A worth is preferred to 0, the fixed order, only if it loses significantly less: a
    one-sided paired t-test over the tasks, at 5 % divided by the number of worths that were tried.
    """
    learnt = [(task, mean_gains(_others(tasks, task))) for task in tasks]
    lost = {worth: [_regret(task, gains, worth) for task, gains in learnt] for worth in WORTHS}
    best = min(WORTHS, key=lambda worth: sum(lost[worth]))
    return Evidence(mean_gains(tasks), best if _clearly_less(lost[best], lost[0.0]) else 0.0)


def _clearly_less(lost: Sequence[float], otherwise: Sequence[float]) -> bool:
    if len(lost) < 2 or lost == otherwise:
        return False
    return float(stats.ttest_rel(lost, otherwise, alternative="less").pvalue) < LEVEL / (len(WORTHS) - 1)


def mean_gains(tasks: Sequence[Task]) -> dict[str, Gain]:
    """The mean gain over full fine-tuning of every strategy that was compared."""
    found: dict[str, list[float]] = {}
    for task in tasks:
        for name, score in task.scores.items():
            found.setdefault(name, []).append(score - task.scores[BASELINE])
    return {name: Gain(statistics.fmean(gains), len(gains)) for name, gains in sorted(found.items())}


def advised_order(evidence: Evidence, points: Mapping[str, float]) -> list[str]:
    """All strategies that declare a cost or rules, by expected gain; equals by cost."""
    names = neutral_order()
    return sorted(names, key=lambda name: -evidence.expected(name) - evidence.worth * points.get(name, 0.0))


def judged_without(
    tasks: Sequence[Task], learn: Callable[[Sequence[Task]], Evidence] = fit
) -> dict[str, tuple[str, ...]]:
    """For each task, the advised order if everything, the worth of points too, is learnt from other data."""
    return {task.name: tuple(advised_order(learn(_others(tasks, task)), task.points)) for task in tasks}


def _others(tasks: Sequence[Task], left_out: Task) -> list[Task]:
    return [task for task in tasks if (task.data or task.name) != (left_out.data or left_out.name)]


def _regret(task: Task, gains: Mapping[str, Gain], worth: float) -> float:
    order = [name for name in advised_order(Evidence(gains, worth), task.points) if name in task.scores]
    best = max(task.scores.values())
    return statistics.fmean(best - max(task.scores[name] for name in order[:k]) for k in FIRST)
