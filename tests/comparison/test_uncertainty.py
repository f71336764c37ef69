"""Intervals of differences: by definition, and by how often they contain the true value."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from hf_ft.comparison.uncertainty import from_predictions, from_seeds


@pytest.mark.parametrize("differences", [(0.01, 0.05, -0.02, 0.03), (0.02, 0.04), (0.1, 0.2, -0.1)])
def test_interval_over_seeds_is_that_of_the_t_test(differences):
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert from_seeds(differences).interval(np.mean(differences)) == pytest.approx(tuple(expected))


def test_equal_differences_are_certain_and_one_is_not():
    assert from_seeds([0.1, 0.1]).interval(0.1) == (0.1, 0.1)
    assert from_seeds([0.1]) is None


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_error_and_freedom_by_hand(metric, seeds):
    random = np.random.default_rng(seeds)
    labels = [0, 0, 0, 1, 1, 1, 1]
    ours, theirs = random.integers(0, 2, (2, seeds, 7)).tolist()
    groups = [[i for i, c in enumerate(labels) if metric == "accuracy" or c == own] for own in (0, 1)]
    groups = groups[:1] if metric == "accuracy" else groups
    gaps = [[(ours[s][i] == labels[i]) - (theirs[s][i] == labels[i]) for s in range(seeds)] for i in range(7)]
    terms = []
    for group in groups:
        values = [sum(gaps[i]) / seeds for i in group]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        terms.append((variance / len(values) / len(groups) ** 2, len(values) - 1))
    if seeds > 1:
        by_seed = [sum(sum(gaps[i][s] for i in group) / len(group) for group in groups) for s in range(seeds)]
        by_seed = [value / len(groups) for value in by_seed]
        mean = sum(by_seed) / seeds
        terms.append((sum((value - mean) ** 2 for value in by_seed) / (seeds - 1) / seeds, seeds - 1))
    variance = sum(term for term, _ in terms)
    found = from_predictions(metric, ours, theirs, labels)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.freedom == pytest.approx(variance**2 / sum(term**2 / own for term, own in terms))


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_intervals_contain_the_true_value_over_seeds_and_samples(seeds):
    """Two strategies whose skill varies with the seed, on random samples of varying difficulty."""
    random = np.random.default_rng(0)
    labels, held, errors, means = np.repeat([0, 1], [40, 80]), [], [], []
    truth = 0.1 / math.sqrt(2 * math.pi * (1 + 0.2**2 + 0.05**2))  # difficulty, noise and skill are normal
    for _ in range(500):
        hard = random.normal(0, 1, 120)
        skills = random.normal([[0.05], [-0.05]], 0.05, (2, seeds))
        right = (hard + random.normal(0, 0.2, (2, seeds, 120))) < skills[..., None]
        ours, theirs = np.where(right, labels, 1 - labels)
        gaps = right[0].astype(float) - right[1]
        mean = float(np.mean([gaps[:, labels == c].mean() for c in (0, 1)]))
        found = from_predictions("balanced_accuracy", ours, theirs, labels)
        low, high = found.interval(mean)
        held.append(low <= truth <= high)
        errors.append(found.error)
        means.append(mean)
    assert 0.94 <= np.mean(held) <= 0.995
    assert 0.95 < np.sqrt(np.mean(np.square(errors))) / np.std(means) < 1.4


def test_no_uncertainty_from_predictions():
    assert from_predictions("macro_f1", [[0, 1]], [[0, 1]], [0, 1]) is None
    assert from_predictions("balanced_accuracy", [[0, 1, 1]], [[0, 1, 1]], [0, 1, 1]) is None  # a class with one sample
    assert from_predictions("accuracy", [[0, 1]], [[0, 1, 1]], [0, 1, 1]) is None  # not all predictions were kept
    same = from_predictions("accuracy", [[0, 1, 1]], [[0, 1, 1]], [0, 1, 1])
    assert same.interval(0.0) == (0.0, 0.0)
