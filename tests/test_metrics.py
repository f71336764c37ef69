"""The local metrics agree with scikit-learn, stay offline, and fail with a useful message."""

import itertools
import warnings

import evaluate
import numpy as np
import pytest
from sklearn import metrics as sk
from transformers import EvalPrediction

from hf_ft.metrics import LOCAL_METRICS, classification_metrics, compute_metrics


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def refuse(name, *args, **kwargs):
        raise ConnectionError("no network here")

    monkeypatch.setattr(evaluate, "load", refuse)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 4)), rng.integers(0, 4, size=40)


def test_single_label_matches_sklearn(batch):
    logits, labels = batch
    scores = classification_metrics(EvalPrediction(logits, labels))
    predicted = logits.argmax(-1)
    assert scores == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
            "macro_f1": sk.f1_score(labels, predicted, average="macro"),
        }
    )
    assert all(type(value) is float for value in scores.values())


def test_logits_may_be_first_of_a_tuple(batch):
    logits, labels = batch
    plain = classification_metrics(EvalPrediction(logits, labels))
    assert classification_metrics(EvalPrediction((logits, np.zeros((40, 2, 2))), labels)) == plain


def test_class_absent_from_references_is_silent_and_left_out(batch):
    logits, labels = batch
    labels = labels % 3  # the logits still predict class 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = classification_metrics(EvalPrediction(logits, labels))
    with pytest.warns(UserWarning, match="not in y_true"):
        assert scores["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, logits.argmax(-1)))


def test_samples_without_label_do_not_count(batch):
    logits, labels = batch
    some, known = np.where(np.arange(40) % 3, labels, -100), np.arange(40) % 3 > 0
    wanted = classification_metrics(EvalPrediction(logits[known], labels[known]))
    assert classification_metrics(EvalPrediction(logits, some)) == wanted
    assert compute_metrics(["accuracy"])(EvalPrediction(logits, some)) == {"accuracy": wanted["accuracy"]}
    for metrics in (classification_metrics, compute_metrics(["accuracy"])):  # predictions are wanted nevertheless
        assert metrics(EvalPrediction(logits, np.full(40, -100))) == {}


def test_multi_label_cuts_logits_at_zero():
    logits = np.array([[2.0, -1.0, 3.0], [-0.1, 0.2, -5.0]])
    labels = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])  # the Trainer hands multi-label references as floats
    scores = classification_metrics(EvalPrediction(logits, labels))
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 2 / 3})


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_regression(shape):
    predicted = np.array([1.0, 2.0, 4.0]).reshape(shape)
    scores = classification_metrics(EvalPrediction(predicted, np.array([1.0, 2.5, 2.0])))
    assert scores == pytest.approx({"mse": 4.25 / 3, "mae": 2.5 / 3})


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2,\)"):
        classification_metrics(EvalPrediction(np.zeros((3, 4)), np.zeros(2)))


def test_named_local_metrics_need_no_hub_and_can_be_called_again(batch):
    compute = compute_metrics(["macro_f1", "accuracy"])
    first = compute(EvalPrediction(*batch))
    assert list(first) == ["macro_f1", "accuracy"]
    assert compute(EvalPrediction(*batch)) == first


def test_other_names_go_through_evaluate(batch, monkeypatch):
    class Count:
        def compute(self, predictions, references):
            return {"count": len(predictions)}

    monkeypatch.setattr(evaluate, "load", lambda name: Count())
    assert compute_metrics(["count"])(EvalPrediction(*batch)) == {"count": 40}


def test_unknown_name_is_reported_with_the_local_ones():
    with pytest.raises(ValueError, match="'nosuch'.*no network here.*accuracy, balanced_accuracy, macro_f1"):
        compute_metrics(["accuracy", "nosuch"])


def test_local_metric_of_another_task_is_refused(batch):
    with pytest.raises(ValueError, match="'mse' does not suit a single_label task.*accuracy"):
        compute_metrics(["mse"])(EvalPrediction(*batch))


@pytest.mark.parametrize("name", LOCAL_METRICS)
def test_local_metrics_are_evaluate_metrics(name):
    metric = LOCAL_METRICS[name]()
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    assert metric.compute()[name] in (0.0, 1.0)


def test_equal_scores_are_ties_whichever_classes_they_come_from():
    """Recalls of 1/5 to 1, in every order: their mean is the same."""
    found = set()
    for order in itertools.permutations(range(1, 6)):
        labels = np.repeat(np.arange(5), 5)
        predictions = np.concatenate([[c] * right + [(c + 1) % 5] * (5 - right) for c, right in enumerate(order)])
        logits = np.eye(5)[predictions]
        found.add(classification_metrics(EvalPrediction(logits, labels))["balanced_accuracy"])
    assert found == {0.6}
