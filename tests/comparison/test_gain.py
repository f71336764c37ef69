"""What the winner gained, and how certain that is."""

import numpy as np
import pytest

from hf_ft.comparison.gain import gain, paired_standard_error
from hf_ft.comparison.results import Results
from tests.comparison.report import made_up_results


def test_the_gain_is_that_of_the_predictions():
    results = Results.from_dict(made_up_results.comparison())
    assert results.winner not in ("", "full")
    labels = np.asarray(results.labels["test"])

    def score(name):
        runs = [np.asarray(run.predictions["test"]) == labels for run in results[name].finished_runs]
        return np.mean([[right[labels == c].mean() for c in np.unique(labels)] for right in runs])

    difference, error = gain(results)
    assert difference == pytest.approx(score(results.winner) - score("full"))
    assert 0.0 < error < 0.1


def test_no_gain_where_full_fine_tuning_wins_or_no_error_where_none_is_known():
    assert gain(Results.from_dict(made_up_results.smallest())) is None
    content = made_up_results.comparison()
    content["metric"] = "macro_f1"
    for contender in content["contenders"]:
        for run in contender["runs"]:
            for scores in run["scores"].values():
                scores["macro_f1"] = scores["balanced_accuracy"]
    difference, error = gain(Results.from_dict(content))
    assert difference is not None and error is None


def test_paired_standard_error_of_a_single_seed():
    """By the definition, in loops."""
    labels = [0, 0, 0, 1, 1, 1, 1]
    ours, theirs = [0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]
    gaps = [(a == c) - (b == c) for a, b, c in zip(ours, theirs, labels, strict=True)]
    variance = 0.0
    for label in (0, 1):
        own = [gap for gap, c in zip(gaps, labels, strict=True) if c == label]
        mean = sum(own) / len(own)
        variance += sum((gap - mean) ** 2 for gap in own) / (len(own) - 1) / len(own) / 4
    assert paired_standard_error("balanced_accuracy", [ours], [theirs], labels) == pytest.approx(variance**0.5)


def test_paired_standard_error_covers_seeds_and_images():
    """The spread of the difference over many test sets and seeds is what it says of each of them, or a bit less."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 80])
    found, said = [], []
    for _ in range(400):
        hard = random.random(120)
        skills = random.normal([[0.7], [0.6]], 0.05, (2, 5))
        right = (hard + random.normal(0, 0.2, (2, 5, 120))) < skills[..., None]
        ours, theirs = np.where(right, labels, 1 - labels)
        gaps = right[0].astype(float) - right[1]
        found.append(np.mean([gaps[:, labels == c].mean() for c in (0, 1)]))
        said.append(paired_standard_error("balanced_accuracy", ours, theirs, labels))
    assert 0.95 < np.mean(said) / np.std(found) < 1.25


def test_no_paired_standard_error():
    assert paired_standard_error("macro_f1", [[0, 1]], [[0, 1]], [0, 1]) is None
    assert paired_standard_error("balanced_accuracy", [[0, 1, 1]], [[0, 1, 1]], [0, 1, 1]) is None  # a class of one
