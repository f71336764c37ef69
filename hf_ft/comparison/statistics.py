"""Statistics of a comparison: means over seeds, paired differences from full fine-tuning, ranking, Pareto front.

Everything is computed from :class:`~hf_ft.comparison.results.Results` alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_ft.comparison.results import Contender, Results, Training
from hf_ft.comparison.uncertainty import Uncertainty, from_predictions, from_seeds
from hf_ft.core.config import BASELINE
from hf_ft.documents.text import SAME

SPLITS = ("validation", "test", "ood")


@dataclass(frozen=True)
class Spread:
    """Scores over seeds.

    Attributes:
        by_seed: the score of each seed; at least one.
    """

    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        r"""Over the seeds, :math:`\sqrt{\sum_i (s_i - \bar s)^2 / (n - 1)}`; None with one seed."""
        return statistics.stdev(self.by_seed.values()) if self.n > 1 else None


@dataclass(frozen=True)
class Difference:
    """Paired differences from full fine-tuning, over the common seeds.

    Attributes:
        by_seed: score minus that of full fine-tuning, for at least one seed. For errors, negative is better.
        uncertainty: the uncertainty of the mean; None if unknown.
        wins: number of seeds with a better score.
        ties: number of seeds with an equal score.
        losses: number of seeds with a worse score.
    """

    by_seed: Mapping[int, float]
    uncertainty: Uncertainty | None
    wins: int
    ties: int
    losses: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the mean, 95 %; None with one seed, which does not show how much training varies by chance."""
        several = self.uncertainty is not None and len(self.by_seed) > 1
        return self.uncertainty.interval(self.mean) if self.uncertainty is not None and several else None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0; False if there is no interval."""
        return self.interval is not None and (self.interval[0] > SAME or self.interval[1] < -SAME)


@dataclass(frozen=True)
class Standing:
    """The statistics of one contender.

    Attributes:
        contender: the contender.
        rank: starts at 1; None if it did not finish.
        spreads: scores by split.
        differences: by split, for seeds shared with full fine-tuning; empty for full fine-tuning itself.
        standard_errors: by split, mean over the runs; see :func:`standard_error`.
        seconds: wall-clock time of one training run, mean over the final runs; None without final runs.
        compute: compute seconds of one training run including the measurement, mean over the final runs; may be None.
        peak_memory_mb: maximum over the final runs; may be None.
        parameters_trained: number of trained parameters; may be None.
        checkpoint_mb: size of the checkpoint; may be None.
    """

    contender: Contender
    rank: int | None
    spreads: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    standard_errors: Mapping[str, float]
    seconds: float | None
    compute: float | None
    peak_memory_mb: float | None
    parameters_trained: int | None
    checkpoint_mb: float | None

    @property
    def name(self) -> str:
        return self.contender.name

    @property
    def failed_trials(self) -> int:
        return sum(trial.validation is None for trial in self.contender.trials)


def spread(scores: Mapping[int, float | None]) -> Spread | None:
    """The finite scores over seeds; None if there are none."""
    finite = {seed: value for seed, value in scores.items() if value is not None and math.isfinite(value)}
    return Spread(finite) if finite else None


def paired_difference(
    ours: Spread, baseline: Spread, greater_is_better: bool = True, uncertainty: Uncertainty | None = None
) -> Difference | None:
    """Differences over common seeds; None if there are none.

    Args:
        uncertainty: the uncertainty of the mean, if known from predictions; otherwise it follows from the seeds alone.
    """
    seeds = [seed for seed in ours.by_seed if seed in baseline.by_seed]
    if not seeds:
        return None
    differences = {seed: ours.by_seed[seed] - baseline.by_seed[seed] for seed in seeds}
    values = [0.0 if abs(value) < SAME else value for value in differences.values()]
    gains = values if greater_is_better else [-value for value in values]
    signs = [sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains), sum(gain < 0 for gain in gains)]
    return Difference(dict(zip(seeds, values, strict=True)), uncertainty or from_seeds(values), *signs)


def standard_error(metric: str, predictions: Sequence[int], labels: Sequence[int]) -> float | None:
    r"""One standard error of a score, from the finite size of the evaluation set.

    .. math:: \sqrt{a (1 - a) / n} \quad\text{of accuracy } a, \qquad
        \frac{1}{C} \sqrt{\sum_c r_c (1 - r_c) / n_c} \quad\text{of the mean of the recalls } r_c

    Args:
        metric: ``accuracy`` or ``balanced_accuracy``; None for others.
        predictions: (n,) classes.
        labels: (n,) classes.
    """
    if not labels or len(predictions) != len(labels):
        return None
    errors = _errors_of_runs(metric, [predictions], labels)
    return None if errors is None else float(errors[0])


def _errors_of_runs(metric: str, predictions: Sequence[Sequence[int]], labels: Sequence[int]) -> np.ndarray | None:
    """:func:`standard_error` of several runs at once, (R,): all their predictions are compared with the labels."""
    if metric not in ("accuracy", "balanced_accuracy"):
        return None
    truth = np.asarray(labels) if metric == "balanced_accuracy" else np.zeros(len(labels), dtype=int)
    order = np.argsort(truth, kind="stable")
    _, starts, sizes = np.unique(truth[order], return_index=True, return_counts=True)
    right = np.asarray(predictions)[:, order] == np.asarray(labels)[order]
    means = np.add.reduceat(right, starts, axis=1, dtype=int) / sizes  # (R, C)
    return np.sqrt((means * (1 - means) / sizes).sum(axis=1)) / len(sizes)


def standings(results: Results) -> tuple[Standing, ...]:
    """All contenders: first those that finished, ranked by mean validation score, then the others.

    The ranking uses validation scores because they chose the winner; test scores are only reported. Ties are broken by
    the score over the later half of the epochs, then by order.
    """
    baseline = next((contender for contender in results.contenders if contender.name == BASELINE), None)
    everyone = [_standing(results, contender, baseline) for contender in results.contenders]
    sign = -1 if results.greater_is_better else 1
    finished = sorted(
        filter(_is_ranked, everyone),
        key=lambda s: (round(sign * s.spreads["validation"].mean, 9), round(sign * _late(s.contender), 9)),
    )
    ranked = [replace(standing, rank=rank) for rank, standing in enumerate(finished, start=1)]
    return (*ranked, *(standing for standing in everyone if not _is_ranked(standing)))


def _late(contender: Contender) -> float:
    """Mean validation score over the later half of the epochs of the final runs."""
    curves = [[point["validation"] for point in run.curve] for run in contender.finished_runs]
    means = [statistics.fmean(curve[len(curve) // 2 :]) for curve in curves if curve]
    return statistics.fmean(means) if means else 0.0


def _is_ranked(standing: Standing) -> bool:
    """Only contenders whose final runs all succeeded are ranked: the mean must cover all seeds."""
    contender = standing.contender
    whole = len(contender.finished_runs) == len(contender.runs)
    return contender.status == "finished" and whole and "validation" in standing.spreads


def winner(results: Results, entries: Sequence[Standing]) -> Standing | None:
    """The winner named in the results, otherwise the first in the ranking; None if no contender finished."""
    ranked = [standing for standing in entries if standing.rank is not None]
    named = [standing for standing in ranked if standing.name == results.winner]
    return next(iter(named or ranked), None)


def pareto_front(points: Mapping[str, tuple[float, float]], greater_is_better: bool = True) -> tuple[str, ...]:
    """The names of all non-dominated points in score and seconds, fastest first.

    Args:
        points: score and seconds, by name.
        greater_is_better: whether higher scores are better.
    """
    sign = 1 if greater_is_better else -1
    front: list[str] = []
    best = -math.inf
    kept: tuple[float, float] | None = None
    for name, (score, seconds) in sorted(points.items(), key=lambda item: (item[1][1], -sign * item[1][0])):
        if sign * score > best:
            best, kept = sign * score, (score, seconds)
            front.append(name)
        elif kept == (score, seconds):  # equal points are all on the front
            front.append(name)
    return tuple(front)


def front_of(results: Results, entries: Iterable[Standing], split: str) -> tuple[str, ...]:
    """The Pareto front of mean score on a split and compute seconds, among contenders that finished."""
    points = {
        standing.name: (standing.spreads[split].mean, standing.compute)
        for standing in entries
        if standing.rank is not None and split in standing.spreads and standing.compute is not None
    }
    return pareto_front(points, results.greater_is_better)


def _spreads(results: Results, contender: Contender) -> dict[str, Spread]:
    spreads = {}
    for split in SPLITS:
        scores = {run.seed: _score(run, split, results.metric) for run in contender.finished_runs}
        if (over_seeds := spread(scores)) is not None:
            spreads[split] = over_seeds
    return spreads


def _score(run: Training, split: str, metric: str) -> float | None:
    return run.validation if split == "validation" else run.scores.get(split, {}).get(metric)


def _standing(results: Results, contender: Contender, baseline: Contender | None) -> Standing:
    spreads, runs = _spreads(results, contender), contender.finished_runs
    differences = {} if baseline in (contender, None) else paired_differences(results, contender, baseline)
    sizes = [run.checkpoint_mb for run in runs if run.checkpoint_mb is not None]
    return Standing(
        contender=contender,
        rank=None,
        spreads=spreads,
        differences=differences,
        standard_errors=_standard_errors(results, runs),
        seconds=statistics.fmean(run.seconds for run in runs) if runs else None,
        compute=contender.measure_seconds + statistics.fmean(run.compute for run in runs) if runs else None,
        peak_memory_mb=max((run.peak_memory_mb for run in runs), default=None),
        parameters_trained=max((run.parameters_trained for run in runs), default=None),
        checkpoint_mb=max(sizes, default=None),
    )


def paired_differences(results: Results, ours: Contender, baseline: Contender) -> dict[str, Difference]:
    """The paired differences between a contender and another, by split."""
    spreads, theirs = _spreads(results, ours), _spreads(results, baseline)
    pairs = {
        split: paired_difference(
            spreads[split], theirs[split], results.greater_is_better, _uncertainty(results, ours, baseline, split)
        )
        for split in spreads
        if split in theirs
    }
    return {split: difference for split, difference in pairs.items() if difference is not None}


def _uncertainty(results: Results, ours: Contender, baseline: Contender, split: str) -> Uncertainty | None:
    """The uncertainty of the mean difference over common seeds, if the predictions were kept."""
    labels = results.labels.get(split, ())
    predicted, others = (
        {run.seed: run.predictions.get(split, ()) for run in one.finished_runs} for one in (ours, baseline)
    )
    seeds = [seed for seed in predicted if seed in others]
    if not labels or not seeds:
        return None
    return from_predictions(results.metric, [predicted[s] for s in seeds], [others[s] for s in seeds], labels)


def _standard_errors(results: Results, runs: Sequence[Training]) -> dict[str, float]:
    by_split = {}
    for split in SPLITS:
        labels = results.labels.get(split, ())
        known = [found for run in runs if len(found := run.predictions.get(split, ())) == len(labels)]
        errors = _errors_of_runs(results.metric, known, labels) if labels and known else None
        if errors is not None:
            by_split[split] = statistics.fmean(errors.tolist())
    return by_split
