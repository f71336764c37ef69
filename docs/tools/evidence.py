"""hf_ft/advice/evidence.json and the tables of docs/advise.md, made from the comparisons in docs/results/."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence

from docs.tools.results import NOT_YET, TITLES, Table, read
from hf_ft.advice import how_often_right
from hf_ft.advice.evidence import FILE, RULES_ALONE, Evidence
from hf_ft.advice.fit import Task, fit, judged_without, mean_gains
from hf_ft.advice.regret import FIRST, fixed_order, judged_table, summary
from hf_ft.advice.rules import rule_points
from hf_ft.advice.signals import Signals
from hf_ft.comparison.results import Results
from hf_ft.core.config import BASELINE, strategies

__all__ = ["FILE", "fitted", "table_of_advice", "table_of_orders"]
SAME_DATA = {"digits": "mnist"}  # other tasks from the same data begin with the same word


def kept() -> dict[str, list[Results]]:
    """The results of each task with every strategy at its defaults, one for each split."""
    with_signals = {
        name: [one for one in splits if one.advice is not None] for name, splits in read("defaults", TITLES).items()
    }
    return {name: splits for name, splits in with_signals.items() if splits}


@functools.cache
def kept_tasks() -> tuple[Task, ...]:
    """What the advice is fitted to."""
    return tuple(_task(name, splits) for name, splits in kept().items())


def _task(name: str, splits: Sequence[Results]) -> Task:
    """Scores and points are means over the splits; strategies missing from any split are left out."""
    scores = [_scores(results) for results in splits]
    names = [one for one in scores[0] if all(one in own for own in scores)]
    points = [rule_points(Signals.from_dict(results.advice["signals"])) for results in splits if results.advice]
    data = name.partition("_")[0]
    return Task(name, _mean(scores, names), _mean(points, points[0]), SAME_DATA.get(data, data))


def _mean(of: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    return {name: round(statistics.fmean(one[name] for one in of), 9) for name in names}


def _scores(results: Results) -> dict[str, float]:
    """The mean test score of every strategy that the advice ranks; compositions are not among them."""
    finished = {one.name: one.finished_runs for one in results.contenders if one.name in strategies()}
    return {
        name: statistics.fmean(run.scores["test"][results.metric] for run in runs)
        for name, runs in finished.items()
        if runs and all("test" in run.scores for run in runs)
    }


def fitted() -> str:
    """The text of hf_ft/advice/evidence.json."""
    evidence = fit(kept_tasks()).to_dict()
    evidence["gains"] = {name: gain | {"mean": round(gain["mean"], 6)} for name, gain in evidence["gains"].items()}
    return json.dumps(evidence, indent=1) + "\n"


def table_of_advice(table: Table) -> str:
    """How often the advice was right on tasks to which it was not fitted."""
    tasks = kept_tasks()
    return table(*judged_table(_judged(tasks, judged_without(tasks)))) if tasks else NOT_YET


def table_of_orders(table: Table) -> str:
    """The loss from trying the first strategies of several orders, each learnt without the task it is judged on."""
    tasks = kept_tasks()
    if not tasks:
        return NOT_YET
    orders = {
        "mean gains and rules, as advised": judged_without(tasks),
        "mean gains alone": judged_without(tasks, lambda others: Evidence(mean_gains(others))),
        "rules alone": judged_without(tasks, lambda others: RULES_ALONE),
        "full fine-tuning, then by cost": {task.name: fixed_order() for task in tasks},
    }
    rows = []
    for title, order in orders.items():
        total = summary(_judged(tasks, order))
        first = f"{round(total['in_top_3'] * len(tasks))} of {len(tasks)}"
        rows.append((title, first, *(f"{total[f'regret_{k}']:.3f}" for k in FIRST)))
    total = summary(_judged(tasks, judged_without(tasks)))
    rows.append(("a random order, in expectation", "", *(f"{total[f'random_{k}']:.3f}" for k in FIRST)))
    return table(("order", "best among the first three", *(f"regret after {k}" for k in FIRST)), rows)


def _judged(tasks: Sequence[Task], orders: Mapping[str, Sequence[str]]) -> list[dict[str, object]]:
    spreads = {name: _std_of_full(splits) for name, splits in kept().items()}
    return how_often_right(
        {"task": task.name, "advice": orders[task.name], "scores": task.scores, "full_std": spreads[task.name]}
        for task in tasks
    )


def _std_of_full(splits: Sequence[Results]) -> float:
    runs = [
        run for results in splits for one in results.contenders if one.name == BASELINE for run in one.finished_runs
    ]
    return statistics.stdev(run.scores["test"][splits[0].metric] for run in runs)
