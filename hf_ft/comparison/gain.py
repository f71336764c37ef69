"""What the winner of a comparison gained over full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import standings


def gain(results: Results) -> tuple[float, float | None] | None:
    """What the winner gained over full fine-tuning on test, and its standard error; None if it is the winner."""
    difference = next((s.differences.get("test") for s in standings(results) if s.name == results.winner), None)
    if difference is None:
        return None
    labels = results.labels.get("test", ())
    ours, theirs = (
        [run.predictions.get("test", ()) for run in results[name].finished_runs if run.seed in difference.by_seed]
        for name in (results.winner, results.contenders[0].name)
    )
    known = bool(labels) and all(len(predicted) == len(labels) for predicted in (*ours, *theirs))
    return difference.mean, paired_standard_error(results.metric, ours, theirs, labels) if known else None


def paired_standard_error(
    metric: str, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], labels: Sequence[int]
) -> float | None:
    r"""Standard error of the difference of two strategies' mean scores, on the same test samples and seeds.

    With :math:`d_i` the mean over seeds of (ours is right) - (theirs is right) on sample i, the difference in balanced
    accuracy is the mean over classes of the classes' means, and its variance

    .. math:: \frac{1}{C^2} \sum_c \frac{s_c^2}{n_c} + \frac{s_{seeds}^2}{S}

    the latter from the differences of single seeds if there are several. (A bit too large: what a seed does to single
    samples counts in both.) For accuracy, all samples are one class.

    Args:
        metric: ``balanced_accuracy`` or ``accuracy``; None is returned for any other.
        ours, theirs: predicted classes, for each seed.
        labels: the classes.
    """
    if metric not in ("accuracy", "balanced_accuracy") or len(labels) < 2:
        return None
    classes = np.asarray(labels) if metric == "balanced_accuracy" else np.zeros(len(labels))
    right = [np.asarray(runs) == np.asarray(labels) for runs in (ours, theirs)]
    gaps = right[0].astype(float) - right[1].astype(float)  # (seeds, samples)
    groups = [gaps[:, classes == label] for label in np.unique(classes)]
    if min(group.shape[1] for group in groups) < 2:
        return None
    within = sum(float(group.mean(axis=0).var(ddof=1)) / group.shape[1] for group in groups) / len(groups) ** 2
    seeds = np.mean([group.mean(axis=1) for group in groups], axis=0)
    between = float(seeds.var(ddof=1)) / len(seeds) if len(seeds) > 1 else 0.0
    return math.sqrt(within + between)
