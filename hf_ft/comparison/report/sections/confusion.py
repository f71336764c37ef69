"""The winner's confusion matrix."""

from __future__ import annotations

from hf_ft.comparison.results import Results, Training
from hf_ft.comparison.statistics import Standing
from hf_ft.documents.confusion import Confusion


def saved_run(results: Results, best: Standing) -> Training | None:
    """The winner's saved run: the one with ``winner_seed``, otherwise the best by validation."""
    runs = best.contender.finished_runs
    chosen = [run for run in runs if run.seed == results.winner_seed]
    scored = [run for run in runs if run.validation is not None]
    pick = max if results.greater_is_better else min
    return chosen[0] if chosen else pick(scored, key=lambda run: run.validation or 0.0, default=None)


def confusion(results: Results, best: Standing) -> Confusion | None:
    """The confusion matrix of the winner's saved run on test, otherwise validation; None without predictions."""
    run = saved_run(results, best)
    for split in ("test", "validation"):
        predicted, labels = (run.predictions if run else {}).get(split, ()), results.labels.get(split, ())
        if run and predicted and len(predicted) == len(labels):
            return Confusion.of(split, results.data.get("classes") or (), labels, predicted, run.seed)
    return None
