"""The winner's confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_ft.comparison.results import Results, Training
from hf_ft.comparison.statistics import Standing


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    Attributes:
        split: the split of the predictions.
        seed: the seed of the run that made the predictions.
        classes: the C class names.
        counts: (C, C), one row per true class.
    """

    split: str
    seed: int
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @cached_property
    def support(self) -> tuple[int, ...]:
        """(C,), the number of samples of each class."""
        return tuple(map(sum, self.counts))

    @cached_property
    def recall(self) -> tuple[float | None, ...]:
        """(C,), the recall of each class; None for a class without samples."""
        return tuple(
            row[c] / n if n else None for c, (row, n) in enumerate(zip(self.counts, self.support, strict=True))
        )

    def most_confused(self, limit: int) -> list[tuple[int, int, int]]:
        """True class, predicted class and count of the most frequent errors, in descending order of count."""
        pairs = [(t, p, n) for t, row in enumerate(self.counts) for p, n in enumerate(row) if n and t != p]
        return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:limit]


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
            names = [str(name) for name in results.data.get("classes") or ()]
            names += [str(c) for c in range(len(names), max(*predicted, *labels) + 1)]
            counts = np.zeros((len(names), len(names)), dtype=int)
            np.add.at(counts, (np.asarray(labels), np.asarray(predicted)), 1)
            return Confusion(split, run.seed, tuple(names), tuple(tuple(map(int, row)) for row in counts))
    return None
