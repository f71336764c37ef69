"""How certain the difference between two strategies is, from few seeds and a finite evaluation set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Uncertainty:
    """The standard error of a mean difference.

    Attributes:
        error: one standard error.
        freedom: its degrees of freedom; infinite if it is exactly 0.
        covers_samples: whether it includes the finite evaluation set, or only chance in training.
    """

    error: float
    freedom: float
    covers_samples: bool

    def interval(self, mean: float) -> tuple[float, float]:
        r"""Student's interval :math:`\bar d \pm t_{0.975,\nu}\, s` of 95 %."""
        half = self.error * float(student.ppf((1 + LEVEL) / 2, self.freedom)) if self.error else 0.0
        return mean - half, mean + half


def from_seeds(differences: Sequence[float]) -> Uncertainty | None:
    r"""From the differences of S seeds alone, :math:`s / \sqrt S` with S - 1 degrees of freedom; None for one seed."""
    if len(differences) < 2:
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return Uncertainty(error, len(differences) - 1, covers_samples=False)


def from_predictions(
    metric: str, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], labels: Sequence[int]
) -> Uncertainty | None:
    r"""From two strategies' predictions for the same samples with the same seeds.

    With :math:`d_i` the mean over seeds of (ours is right) - (theirs is right) on sample i, the difference in balanced
    accuracy is the mean over classes of the classes' means, and its variance

    .. math:: \frac{1}{C^2} \sum_c \frac{s_c^2}{n_c} + \frac{s_{seeds}^2}{S}

    the latter from the differences of single seeds if there are several. (Slightly too large: the effect of a seed on
    single samples counts in both.) For accuracy, all samples are one class. The degrees of freedom are Satterthwaite's,
    :math:`(\sum_k v_k)^2 / \sum_k (v_k^2 / \nu_k)` over the terms :math:`v_k` of the variance.

    Args:
        metric: ``balanced_accuracy`` or ``accuracy``; None is returned for any other.
        ours, theirs: predicted classes, for each seed.
        labels: the classes; None is returned if one of them has a single sample.
    """
    if metric not in ("accuracy", "balanced_accuracy") or len(labels) < 2:
        return None
    if not all(len(predicted) == len(labels) for predicted in (*ours, *theirs)):
        return None
    classes = np.asarray(labels) if metric == "balanced_accuracy" else np.zeros(len(labels))
    right = [np.asarray(runs) == np.asarray(labels) for runs in (ours, theirs)]
    gaps = right[0].astype(float) - right[1].astype(float)  # (seeds, samples)
    groups = [gaps[:, classes == label] for label in np.unique(classes)]
    if min(group.shape[1] for group in groups) < 2:
        return None
    terms = [
        (float(group.mean(axis=0).var(ddof=1)) / group.shape[1] / len(groups) ** 2, group.shape[1] - 1)
        for group in groups
    ]
    seeds = np.mean([group.mean(axis=1) for group in groups], axis=0)
    if len(seeds) > 1:
        terms.append((float(seeds.var(ddof=1)) / len(seeds), len(seeds) - 1))
    variance = sum(term for term, _ in terms)
    freedom = variance**2 / sum(term**2 / own for term, own in terms) if variance else math.inf
    return Uncertainty(math.sqrt(variance), freedom, covers_samples=True)
