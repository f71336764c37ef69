r"""How well features separate the classes (LogME, a cross-validated linear probe), and how source classes relate.

LogME treats each class as a regression on features :math:`F` (n, D) with weights :math:`w \sim N(0, \alpha^{-1} I)` and
noise of precision :math:`\beta`, and maximises the evidence over both:

.. math::
    \mathrm{LogME} = \frac1C \sum_c \max_{\alpha, \beta} \frac1n \log \int p(y_c | F, w, \beta) \, p(w | \alpha) \, dw

References:
    You, Liu, Wang, Long. LogME: Practical Assessment of Pre-trained Models for Transfer Learning. ICML 2021.
    You, Liu, Zhang, Wang, Jordan, Long. Ranking and Tuning Pre-trained Models. JMLR 23, 2022 (the iteration over t).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

__all__ = [
    "Probe",
    "ProbeScore",
    "cross_validated_probe",
    "cross_validated_relationship",
    "fit_probe",
    "log_evidence",
    "logme",
]

Array = NDArray[np.float64]
FOLDS = 5
STEPS = 500  # fixed-point iterations; about ten suffice unless the features are nearly uninformative
WIDE = 1e10  # bounds t relative to the largest squared singular value; at the bounds it is effectively 0 or infinite


def logme(features: NDArray[Any], labels: NDArray[Any]) -> float:
    """Maximum log evidence per sample of features (n, D) for one-hot labels (n,), averaged over the classes.

    Higher is better, but only comparable for the same labels: the value without any signal depends on the class
    frequencies.
    """
    one_hot = (labels[:, None] == np.unique(labels)[None, :]).astype(np.float64)
    return float(log_evidence(np.asarray(features, dtype=np.float64), one_hot).mean())


def log_evidence(features: Array, targets: Array) -> Array:
    r"""Maximum log evidence per sample of features (n, D) for each column of targets (n, C), (C,).

    With the singular values :math:`\sigma_i` of F, :math:`z = U^\top y` and :math:`t = \alpha / \beta`, the optimal
    :math:`\beta` for a given t is :math:`n / Q` with
    :math:`Q = \sum_i z_i^2 \frac{t}{t + \sigma_i^2} + \|y\|^2 - \|z\|^2`, and

    .. math:: \log p = -\frac n2 \left(\log \frac{2 \pi Q}{n} + 1\right) + \frac12 \sum_i \log \frac{t}{t + \sigma_i^2}
    """
    samples = len(features)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    largest = singular.max(initial=0.0)
    real = singular > largest * max(features.shape) * np.finfo(np.float64).eps
    squares = np.square(singular[real])[:, None]
    inside = np.square(left[:, real].T @ targets)
    outside = np.maximum(np.square(targets).sum(0) - inside.sum(0), 0.0)
    t = _fixed_point(squares, inside, outside, samples)
    kept = t / (t + squares)
    noise = ((inside * kept).sum(0) + outside) / samples
    noise = np.maximum(noise, np.finfo(np.float64).tiny)  # the features may fit the labels exactly
    return -0.5 * (np.log(2 * np.pi * noise) + 1) + 0.5 * np.log(kept).sum(0) / samples


def _fixed_point(squares: Array, inside: Array, outside: Array, samples: int) -> Array:
    r"""Solve for t of each target, (C,), by :math:`t' = \frac{\gamma}{n - \gamma} \frac{\|Fm - y\|^2}{\|m\|^2}`."""
    if not len(squares):
        return np.ones(inside.shape[1])
    t = np.full(inside.shape[1], squares.mean())
    low, high = squares.max() / WIDE, squares.max() * WIDE
    for _ in range(STEPS):
        kept = t / (t + squares)
        known = (1 - kept).sum(0)  # gamma, the effective number of weights determined by the data
        unknown = samples - len(squares) + kept.sum(0)  # n - gamma
        weights = (squares * inside / np.square(t + squares)).sum(0)
        residual = (inside * np.square(kept)).sum(0) + outside
        with np.errstate(divide="ignore"):
            new = np.clip(known / unknown * (residual / weights), low, high)
        if np.allclose(np.log(new), np.log(t), rtol=0, atol=1e-8):
            return new
        t = new
    return t


@dataclass(frozen=True)
class ProbeScore:
    """Cross-validated scores of a classifier.

    Attributes:
        accuracy: mean over the folds.
        balanced_accuracy: mean class recall, averaged over the folds.
        std: standard deviation of the balanced accuracy over the folds.
        folds: number of folds.
        classes: number of classes that were not left out.
    """

    accuracy: float
    balanced_accuracy: float
    std: float
    folds: int
    classes: int


def cross_validated_probe(
    features: NDArray[Any], labels: NDArray[Any], seed: int = 0, groups: NDArray[Any] | None = None
) -> ProbeScore | None:
    """Score a linear probe on features (n, D) and labels (n,) by stratified cross-validation.

    The number of folds is the median class size, clipped to 2 to 5. Classes with a single sample are left out: a probe
    cannot predict a class it was not fitted on. With groups (n,), folds consist of whole groups, and a class is left
    out whose samples are all of one group.

    Returns:
        None if fewer than two classes remain.
    """
    return _cross_validated(_logistic_regression, features, labels, seed, groups)


def cross_validated_relationship(
    probabilities: NDArray[Any], labels: NDArray[Any], seed: int = 0, groups: NDArray[Any] | None = None
) -> ProbeScore | None:
    r"""Score how well source-class probabilities alone predict the target classes, cross-validated like the probe.

    From source probabilities :math:`\theta(x)` (n, C_s), with equally weighted classes:

    .. math::
        \hat y = \arg\max_y \sum_z \hat p(y | z) \, \theta(x)_z, \qquad
        \hat p(y | z) \propto \operatorname{mean}_{i: y_i = y} \theta(x_i)_z

    Only these means are fitted, so the score reflects how related the classes are, not the quality of the features.

    Reference: Nguyen, Hassner, Seeger, Archambeau. LEEP: A New Measure to Evaluate Transferability of Learned
        Representations. ICML 2020 (the same predictor, except for the class weights).
    """
    return _cross_validated(_Relationship, probabilities, labels, seed, groups)


def _cross_validated(
    fit: Callable[[NDArray[Any], NDArray[Any]], Any],
    features: NDArray[Any],
    labels: NDArray[Any],
    seed: int,
    groups: NDArray[Any] | None,
) -> ProbeScore | None:
    units = np.arange(len(labels)) if groups is None else groups  # what is held out as a whole
    classes, counts = np.unique(np.unique(np.stack([labels, units]), axis=1)[0], return_counts=True)
    usual = counts > 1
    if usual.sum() < 2:
        return None
    rows = np.isin(labels, classes[usual])
    features, labels, units = features[rows], labels[rows], units[rows]
    folds = int(np.clip(np.median(counts[usual]), 2, FOLDS))
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    accuracies, balanced = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # a fold may lack a rare class
        for train, test in kind(folds, shuffle=True, random_state=seed).split(
            features, labels, None if groups is None else units
        ):
            if len(np.unique(labels[train])) < 2 or not len(test):  # groups that cannot be dealt out evenly
                continue
            predicted = fit(features[train], labels[train]).predict(features[test])
            true = labels[test]
            accuracies.append(accuracy_score(true, predicted))
            balanced.append(recall_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0))
    if len(balanced) < 2:
        return None
    std = float(np.std(balanced, ddof=1))
    return ProbeScore(float(np.mean(accuracies)), float(np.mean(balanced)), std, len(balanced), int(usual.sum()))


class _Relationship:
    """The predictor of :func:`cross_validated_relationship`."""

    def __init__(self, probabilities: NDArray[Any], labels: NDArray[Any]) -> None:
        self.classes = np.unique(labels)
        means = np.stack([probabilities[labels == c].mean(0) for c in self.classes])
        self.table = means / np.maximum(means.sum(0), np.finfo(np.float64).tiny)

    def predict(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        return self.classes[(probabilities @ self.table.T).argmax(1)]


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted linear probe: logits ``features @ weight.T + bias``.

    Attributes:
        weight: (C, D).
        bias: (C,).
        classes: (C,), the labels in the order of the logits.
    """

    weight: Array
    bias: Array
    classes: NDArray[Any]


def fit_probe(features: NDArray[Any], labels: NDArray[Any]) -> Probe:
    """Fit a linear probe to features (n, D) and labels (n,) of two classes or more."""
    scaler, regression = _logistic_regression(features, labels)
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:  # scikit-learn fits a single logit for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Probe(weight, bias, regression.classes_)


def _logistic_regression(features: NDArray[Any], labels: NDArray[Any]) -> Any:
    """L2-regularised logistic regression (C = 1) on standardised features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(?:failed to converge|lbfgs).*")  # close to the optimum suffices
        made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        return made.fit(np.asarray(features, dtype=np.float64), labels)
