"""The figures of a comparison: against hand-worked numbers, enumeration, brute force and scikit-learn."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score

from hf_ft.comparison.report.build import document
from hf_ft.comparison.report.sections.confusion import confusion, saved_run
from hf_ft.comparison.results import Contender, Results, Training
from hf_ft.comparison.statistics import (
    Spread,
    front_of,
    paired_difference,
    pareto_front,
    spread,
    standard_error,
    standings,
    winner,
)
from hf_ft.comparison.uncertainty import from_predictions, from_seeds
from hf_ft.documents.markdown import markdown
from hf_ft.errors import CheckpointError
from tests.comparison.report import made_up_results


def run(seed, validation, test=None, **more):
    scores = {} if test is None else {"test": {"accuracy": test}}
    return Training(seed=seed, params={}, validation=validation, scores=scores, **more)


def results(*contenders, **more):
    about = {
        "title": "",
        "command": "",
        "metric": "accuracy",
        "greater_is_better": True,
        "model": {},
        "data": {},
        "labels": {},
        "settings": {},
        "versions": {},
        "machine": {},
        "seconds": 0.0,
    }
    return Results(**about | more, contenders=contenders)


def contender(name, *runs, status="finished", **more):
    return Contender(name=name, configs=(), status=status, runs=runs, **more)


def test_mean_and_standard_deviation():
    found = spread({0: 0.8, 1: 0.9, 2: None, 3: math.nan})
    assert found.n == 2 and found.mean == pytest.approx(0.85)
    assert found.std == pytest.approx(math.sqrt((0.05**2 + 0.05**2) / 1))
    assert spread({4: 0.7}).std is None
    assert spread({0: None}) is None and spread({}) is None


def test_differences_are_paired_by_seed():
    ours, full = Spread({0: 0.9, 1: 0.8, 2: 0.7, 9: 0.1}), Spread({2: 0.75, 1: 0.8, 0: 0.8, 5: 1.0})
    found = paired_difference(ours, full)
    assert found.by_seed == pytest.approx({0: 0.1, 1: 0.0, 2: -0.05})
    assert found.mean == pytest.approx(0.05 / 3)
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    error = paired_difference(ours, full, greater_is_better=False)
    assert error.mean == pytest.approx(0.05 / 3) and (error.wins, error.ties, error.losses) == (1, 1, 1)
    lower = paired_difference(Spread({0: 0.1}), Spread({0: 0.3}), greater_is_better=False)
    assert (lower.wins, lower.losses) == (1, 0) and lower.mean == pytest.approx(-0.2)
    assert paired_difference(Spread({0: 1.0}), Spread({1: 1.0})) is None


def test_scores_that_differ_by_rounding_tie():
    found = paired_difference(Spread({0: 0.1 + 0.2, 1: 0.5}), Spread({0: 0.3, 1: 0.5}))
    assert (found.wins, found.ties, found.losses) == (0, 2, 0)
    assert found.interval == (0.0, 0.0) and not found.excludes_zero


def test_interval_of_one_seed_and_of_equal_differences():
    one = paired_difference(Spread({3: 0.6}), Spread({3: 0.5}))
    assert one.interval is None and not one.excludes_zero
    alike = paired_difference(Spread({0: 0.6, 1: 0.7}), Spread({0: 0.5, 1: 0.6}))
    assert alike.interval == pytest.approx((0.1, 0.1)) and alike.excludes_zero


def test_standard_error_of_accuracy_and_of_balanced_accuracy():
    labels, predicted = (0, 0, 1, 1, 1), (0, 1, 1, 1, 0)
    assert standard_error("accuracy", predicted, labels) == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    by_hand = math.sqrt(0.5 * 0.5 / 2 + (2 / 3) * (1 / 3) / 3) / 2
    assert standard_error("balanced_accuracy", predicted, labels) == pytest.approx(by_hand)
    assert standard_error("macro_f1", predicted, labels) is None
    assert standard_error("accuracy", (), labels) is None and standard_error("accuracy", (), ()) is None


def test_standard_error_is_how_much_balanced_accuracy_varies():
    """Over many test sets drawn with the same recalls."""
    random, sizes, recalls = np.random.default_rng(0), (40, 160), (0.6, 0.9)
    labels = np.repeat([0, 1], sizes)
    scores, errors = [], []
    for draw in range(4000):
        right = random.random(len(labels)) < np.repeat(recalls, sizes)
        predicted = np.where(right, labels, 1 - labels)
        scores.append((right[:40].mean() + right[40:].mean()) / 2)
        if draw < 200:
            errors.append(standard_error("balanced_accuracy", tuple(predicted), tuple(labels)))
    assert np.std(scores) == pytest.approx(np.mean(errors), rel=0.05)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_pareto_front_against_brute_force(greater_is_better):
    random = np.random.default_rng(2)
    for count in (1, 2, 7, 30):
        draws = random.integers(0, 8, (count, 2)).tolist()  # many are equal
        points = {str(i): (score / 10, float(seconds)) for i, (score, seconds) in enumerate(draws)}
        sign = 1 if greater_is_better else -1

        def beaten(name, points=points, sign=sign):
            score, seconds = points[name]
            return any(
                sign * s >= sign * score and t <= seconds and (s, t) != (score, seconds) for s, t in points.values()
            )

        front = pareto_front(points, greater_is_better)
        assert set(front) == {name for name in points if not beaten(name)}
        assert [points[name][1] for name in front] == sorted(points[name][1] for name in front)
    assert pareto_front({}) == ()


def test_ranking_goes_by_validation_then_later_epochs_and_the_unfinished_come_last():
    late, early = ([{"epoch": e + 1.0, "validation": v} for e, v in enumerate(s)] for s in ((0.1, 0.8), (0.8, 0.1)))
    found = standings(
        results(
            contender("full", run(0, 0.7, 0.9, seconds=5.0)),
            contender("late", status="not reached", reason="the time was up"),
            contender("named first", run(0, 0.6)),
            contender("named later", run(0, 0.6)),
            contender("at first", dataclasses.replace(run(0, 0.8, 0.1), curve=tuple(early))),
            contender("at last", dataclasses.replace(run(0, 0.8, 0.2), curve=tuple(late))),
            contender("part", run(0, 0.99, 0.99), status="unfinished"),
            contender("torn", run(0, 0.95), dataclasses.replace(run(1, None), error="it broke")),
        )
    )
    assert [(s.name, s.rank) for s in found] == [
        ("at last", 1),
        ("at first", 2),
        ("full", 3),
        ("named first", 4),
        ("named later", 5),
        ("late", None),
        ("part", None),
        ("torn", None),
    ]
    assert found[6].spreads["test"].mean == 0.99  # still told
    assert found[2].differences == {} and found[0].differences["test"].mean == pytest.approx(-0.7)
    assert found[0].differences["validation"].mean == pytest.approx(0.1)


def test_errors_rank_ascending():
    one, two = contender("full", run(0, 0.4)), contender("other", run(0, 0.3))
    content = results(one, two, metric="mse", greater_is_better=False)
    found = standings(content)
    assert [s.name for s in found] == ["other", "full"]
    assert found[0].differences["validation"].wins == 1
    assert winner(content, found).name == "other"


def test_costs():
    runs = [
        run(0, 0.5, seconds=2.0, compute=4.0, peak_memory_mb=10.0, parameters_trained=7, checkpoint_mb=1.5),
        run(1, 0.5, seconds=4.0, compute=6.0, peak_memory_mb=30.0, parameters_trained=7, checkpoint_mb=1.5),
    ]
    trials = (run(0, 0.4, compute=3.0), run(0, None, compute=1.0, error="nan"))
    content = results(contender("full", *runs, trials=trials, measure_seconds=20.0))
    found = standings(content)[0]
    assert (found.seconds, found.compute) == (3.0, 25.0)
    assert (found.peak_memory_mb, found.parameters_trained, found.checkpoint_mb) == (30.0, 7, 1.5)
    assert found.contender.tuning_seconds == 24.0 and found.failed_trials == 1
    assert front_of(content, [found], "validation") == ("full",)
    nothing = standings(results(contender("full", status="failed")))[0]
    assert nothing.seconds is None and nothing.compute is None and nothing.checkpoint_mb is None


def test_no_baseline_no_differences():
    found = standings(results(contender("a", run(0, 0.5)), contender("b", run(0, 0.6))))
    assert [s.name for s in found] == ["b", "a"] and all(s.differences == {} for s in found)
    assert winner(results(), ()) is None


def test_the_saved_run_and_its_confusion():
    labels = (0, 0, 0, 1, 1, 2, 2, 2, 2)
    predicted = {0: (0, 0, 1, 1, 1, 2, 2, 2, 0), 1: (0,) * 9}
    runs = [run(seed, 0.5 + seed / 10, predictions={"test": predicted[seed]}) for seed in (0, 1)]
    data = {"classes": ["a", "b", "c", "never"]}
    content = results(contender("full", *runs), labels={"test": labels}, data=data, winner="full", winner_seed=0)
    best = winner(content, standings(content))
    assert saved_run(content, best).seed == 0
    assert saved_run(dataclasses.replace(content, winner_seed=None), best).seed == 1
    table = confusion(content, best)
    assert np.array_equal(table.counts, confusion_matrix(labels, predicted[0], labels=range(4)))
    assert table.classes == ("a", "b", "c", "never") and table.support == (3, 2, 4, 0)
    expected = recall_score(labels, predicted[0], labels=[0, 1, 2], average=None)
    assert table.recall[:3] == pytest.approx(expected) and table.recall[3] is None
    assert table.most_confused(5) == [(0, 1, 1), (2, 0, 1)] and len(table.most_confused(1)) == 1
    assert confusion(dataclasses.replace(content, labels={}), best) is None


def test_the_made_up_comparison_has_its_scores():
    """Means, differences and standard errors, computed again from the dict alone."""
    content = made_up_results.comparison()
    found = {s.name: s for s in standings(Results.from_dict(content))}
    raw = {c["name"]: c for c in content["contenders"]}
    truth = np.asarray(content["labels"]["ood"])

    def scores(name):
        return np.array([run["scores"]["ood"]["balanced_accuracy"] for run in raw[name]["runs"]])

    for name in ("daft", "lp_ft+l2_sp"):
        assert found[name].spreads["ood"].mean == pytest.approx(scores(name).mean())
        assert found[name].spreads["ood"].std == pytest.approx(scores(name).std(ddof=1))
        assert found[name].differences["ood"].mean == pytest.approx((scores(name) - scores("full")).mean())
        errors = []
        for one in raw[name]["runs"]:
            right = np.asarray(one["predictions"]["ood"]) == truth
            shares = [right[truth == c].mean() for c in (0, 1)]
            errors.append(math.sqrt(sum(r * (1 - r) / (truth == c).sum() for c, r in enumerate(shares))) / 2)
        assert found[name].standard_errors["ood"] == pytest.approx(np.mean(errors))
    assert found["soft"].rank is None and found["soft"].spreads == {}
    assert sum(s.rank is not None for s in found.values()) == len(made_up_results.FINISHED)


def test_differences_are_as_certain_as_seeds_and_samples_make_them():
    """On test, where predictions are kept, both count; on validation, only the seeds."""
    content = made_up_results.comparison()
    content["labels"].pop("validation")
    results = Results.from_dict(content)
    raw = {c["name"]: c for c in content["contenders"]}
    found = next(s for s in standings(results) if s.name == "daft").differences
    predicted = [[run["predictions"]["test"] for run in raw[name]["runs"]] for name in ("daft", "full")]
    assert found["test"].uncertainty == from_predictions("balanced_accuracy", *predicted, content["labels"]["test"])
    assert found["test"].interval == found["test"].uncertainty.interval(found["test"].mean)
    assert found["validation"].uncertainty == from_seeds(list(found["validation"].by_seed.values()))
    assert found["test"].uncertainty.covers_samples and not found["validation"].uncertainty.covers_samples


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_standard_errors_of_all_runs_at_once_are_those_of_each(metric):
    results = Results.from_dict(made_up_results.many_classes(40) | {"metric": metric})
    for standing in standings(results):
        for split, error in standing.standard_errors.items():
            runs = [run.predictions[split] for run in standing.contender.finished_runs]
            each = [standard_error(metric, predicted, results.labels[split]) for predicted in runs]
            assert error == statistics.fmean(each) == pytest.approx(by_hand(metric, runs, results.labels[split]))


def by_hand(metric, runs, labels):
    truth, errors = np.asarray(labels), []
    for predicted in map(np.asarray, runs):
        groups = [truth == c for c in set(labels)] if metric == "balanced_accuracy" else [truth == truth]
        shares = [(float((predicted == truth)[group].mean()), int(group.sum())) for group in groups]
        errors.append(math.sqrt(sum(share * (1 - share) / n for share, n in shares)) / len(groups))
    return sum(errors) / len(errors)


def test_predictions_of_no_class_are_refused():
    """A chart of 10**30 classes would never be finished."""
    content = made_up_results.comparison()
    content["contenders"][0]["runs"][0]["predictions"]["test"][3] = 10**30
    with pytest.raises(CheckpointError, match="predictions or labels of 'test' lie outside the"):
        Results.from_dict(content)


def test_a_report_without_a_winner_says_nothing_about_a_saved_model():
    content = made_up_results.comparison() | {"winner": "", "winner_seed": None}
    assert "is saved in" in markdown(document(Results.from_dict(made_up_results.comparison())))
    assert "is saved in" not in markdown(document(Results.from_dict(content)))
