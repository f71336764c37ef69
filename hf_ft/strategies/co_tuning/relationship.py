r"""The relationship between source and target classes: the maths of Co-Tuning, as pure functions.

The predictions of a pretrained classifier's own head on labelled target samples show which source classes each target
class resembles. This relationship, :math:`p(y_s \mid y_t)`, provides a soft source label for every target sample, on
which the pretrained head is trained together with the new one.

Reference: You, Kou, Long, Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.splits import grouped_folds

__all__ = ["direct_relationship", "fit_temperature", "relationship_loss", "reverse_relationship"]

TEMPERATURES = (0.05, 20.0)
# Probabilities over many source classes are small, so their weights must be allowed to grow large.
STRENGTHS = tuple(10.0**exponent for exponent in range(-2, 5))
# Fits past the best strength take by far the longest: the search ends at a loss this many times the lowest.
OVERFITTING = 1.01


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature, between 0.05 and 20, that calibrates a classifier's confidence to its accuracy.

    .. math:: \arg\min_T \; -\frac1N \sum_n \log \, \operatorname{softmax}(z_n / T)_{y_n}

    Args:
        logits: (N, C), on samples the classifier was not trained on.
        labels: (N,), in [0, C).

    Raises:
        OptionError: if there are no samples, a label is out of range, or logits are not finite.

    Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    """
    logits, labels = _checked("fit_temperature", logits, labels)
    _check_labels("fit_temperature", labels, logits.shape[1])

    def loss(log_temperature: float) -> float:
        return nn.functional.cross_entropy(logits / math.exp(log_temperature), labels).item()

    # The loss is convex in 1 / T, hence unimodal in log T.
    bounds = tuple(math.log(limit) for limit in TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x)


def direct_relationship(logits: Tensor, labels: Tensor, classes: int, temperature: float = 1.0) -> Tensor:
    r"""The source head's mean prediction for the samples of each target class.

    .. math:: p(y_s \mid y_t) = \frac{1}{N_t} \sum_{n : y_n = t} \operatorname{softmax}(z_n / T)_s

    Args:
        logits: (N, C_s), the source head's, on target samples.
        labels: (N,), the target classes, in [0, classes).
        classes: number of target classes.
        temperature: T, by which the source head is calibrated (:func:`fit_temperature` on source samples).

    Returns:
        (classes, C_s), float32 on the CPU; rows sum to 1.

    Raises:
        OptionError: if a class has no samples, a label is out of range, logits are not finite, or the temperature is
            not positive.

    Reference: You, Kou, Long, Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020.
    """
    logits, labels = _checked("direct_relationship", logits, labels)
    counts = _counts("direct_relationship", labels, classes)
    source = _log_source("direct_relationship", logits, temperature).exp()
    sums = source.new_zeros(classes, source.shape[1]).index_add_(0, labels, source)
    return (sums / counts[:, None]).float()


def reverse_relationship(
    logits: Tensor,
    labels: Tensor,
    classes: int,
    temperature: float = 1.0,
    folds: int = 5,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Tensor:
    r"""Predict the target class from the source head's prediction, and invert this by Bayes' rule.

    .. math:: p(y_s \mid y_t) \propto p(y_t \mid y_s) \, p(y_s), \qquad
        p(y_t \mid y_s) = \operatorname{softmax}(g(e_s) / T_g)_t, \qquad
        p(y_s) = \frac1N \sum_n \operatorname{softmax}(z_n / T)_s

    g is a multinomial logistic regression without intercept from source probabilities to target classes, and
    :math:`e_s` the one-hot distribution on source class s. Cross-validation selects the strength of its L2 penalty by
    likelihood, and yields the held-out logits on which its temperature :math:`T_g` is fitted. If some class has a
    single sample, or all its samples are in one group, nothing can be held out: the penalty is scikit-learn's C = 1,
    and :math:`T_g = 1`.

    No sample's prediction is as confident as :math:`e_s`, so g extrapolates: with a few dozen samples per class, its
    rows vary much more between draws of samples than those of :func:`direct_relationship`.

    Args:
        logits: (N, C_s), the source head's, on target samples. Their order does not matter.
        labels: (N,), the target classes, in [0, classes).
        classes: number of target classes.
        temperature: T, by which the source head is calibrated (:func:`fit_temperature` on source samples).
        folds: number of cross-validation folds; at most the number of samples, or groups, of each class.
        seed: seed of the split into folds.
        groups: (N,), numbers of groups that are held out as a whole; None if each sample stands for itself.

    Returns:
        (classes, C_s), float32 on the CPU; rows sum to 1.

    Raises:
        OptionError: if a class has no samples, a label is out of range, logits are not finite, the temperature is not
            positive, or there are fewer than 2 folds.

    Reference: You, Kou, Long, Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020.
    """
    logits, labels = _checked("reverse_relationship", logits, labels)
    _counts("reverse_relationship", labels, classes)
    if folds < 2:
        raise OptionError(f"reverse_relationship: folds={folds} leaves nothing to hold out: use 2 or more, such as 5.")
    if classes == 1:  # a single class: p(y_t | y_s) is 1
        return direct_relationship(logits, labels, classes, temperature)

    # The folds depend on the order of the samples, which changes with every shuffle of the loader.
    rows = logits.numpy()
    order = sorted(range(len(rows)), key=lambda n: (int(labels[n]), rows[n].tobytes()))
    labels = labels[order]
    groups = None if groups is None else groups[order]
    log_source = _log_source("reverse_relationship", logits[order], temperature)
    # The L2 penalty keeps the weights in the span of the samples and is rotation-invariant: in coordinates of that
    # span the fits are the same, and cheaper if there are fewer samples than source classes.
    left, scale, one_hot = np.linalg.svd(log_source.exp().numpy(), full_matrices=False)
    features = left * scale

    strength, calibration = 1.0, 1.0
    parts = _folds(labels.numpy(), folds, seed, groups)
    if parts:
        strength, held_out = _cross_validated(features, labels, classes, parts)
        rows = np.sort(np.concatenate(parts))
        calibration = fit_temperature(held_out[rows], labels[rows])
    g = _regression().set_params(C=_sklearn_c(strength, classes)).fit(features, labels.numpy())
    log_target = (_logits(g, one_hot.T) / calibration).log_softmax(dim=1)
    # In log space: products of small probabilities would underflow to 0 for every source class.
    log_marginal = log_source.logsumexp(dim=0) - math.log(len(log_source))
    return (log_target.T + log_marginal).softmax(dim=1).float()


def relationship_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy of the source head's predictions with soft source labels.

    .. math:: -\frac1B \sum_b \sum_s q_{bs} \log \, \operatorname{softmax}(z_b)_s

    Args:
        logits: (B, C_s), the source head's.
        targets: (B, C_s), the relationship's rows for the samples' target classes.

    Returns:
        A scalar, in float32 (float64 for float64 logits).

    Raises:
        ValueError: if the two differ in shape.

    Reference: You, Kou, Long, Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020.
    """
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"relationship_loss: logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be "
            "(samples, source classes): index the relationship by the labels."
        )
    logits = wide(logits)
    return nn.functional.cross_entropy(logits, targets.to(logits))


# --- the regression from source to target classes -----------------------------------------------------------


def _sklearn_c(strength: float, classes: int) -> float:
    """The C with which scikit-learn fits the softmax model of this penalty strength.

    For two classes scikit-learn fits a single row w, the difference of the softmax model's rows -w/2 and w/2. Their
    penalty, half the sum of squares, is half that of w, so the same model needs twice the C.
    """
    return 2 * strength if classes == 2 else strength


def _regression() -> LogisticRegression:
    # Without an intercept, as in the authors' code. The tolerance applies to the mean gradient, which is small from the
    # start for features this small.
    return LogisticRegression(fit_intercept=False, tol=1e-6, max_iter=10_000, warm_start=True)


def _logits(regression: LogisticRegression, features: np.ndarray) -> Tensor:
    """Logits (N, classes); for two classes scikit-learn returns (N,), the second logit minus the first."""
    scores = torch.from_numpy(regression.decision_function(features))
    return torch.stack((-scores / 2, scores / 2), dim=1) if scores.dim() == 1 else scores


def _folds(labels: np.ndarray, most: int, seed: int, groups: np.ndarray | None) -> list[np.ndarray]:
    """The rows of each fold; none if a class would be missing from what remains."""
    units = np.stack([labels, np.arange(len(labels)) if groups is None else groups])
    folds = min(most, int(np.unique(np.unique(units, axis=1)[0], return_counts=True)[1].min()))
    if folds < 2:
        return []
    if groups is None:
        split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
        return [held_out for _, held_out in split]
    # All groups of a class may end up in one fold, which then cannot be predicted from the others.
    classes = np.unique(labels)
    parts = grouped_folds(labels, groups, folds, seed)
    return [part for part in parts if np.array_equal(np.unique(np.delete(labels, part)), classes)]


def _cross_validated(
    features: np.ndarray, labels: Tensor, classes: int, parts: Sequence[np.ndarray]
) -> tuple[float, Tensor]:
    """The strength with the highest held-out likelihood, and its logits (N, classes), of the rows held out."""
    targets, rows = labels.numpy(), np.sort(np.concatenate(parts))
    fits = [(np.setdiff1d(np.arange(len(targets)), part), part, _regression()) for part in parts]
    losses: dict[float, float] = {}
    for strength in STRENGTHS:  # warm start from the previous fit
        logits = torch.empty(len(targets), classes, dtype=torch.float64)
        for train, test, regression in fits:
            regression.set_params(C=_sklearn_c(strength, classes)).fit(features[train], targets[train])
            logits[test] = _logits(regression, features[test])
        losses[strength] = nn.functional.cross_entropy(logits[rows], labels[rows]).item()
        lowest = min(losses, key=losses.__getitem__)
        if lowest == strength:
            best = logits
        elif losses[strength] > OVERFITTING * losses[lowest]:
            break
    return lowest, best


# --- checks -------------------------------------------------------------------------------------------------


def _checked(name: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64 and labels as integers, on the CPU (some devices have no float64)."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise OptionError(
            f"{name}: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} ({labels.dtype}) do not match: "
            "expected logits (samples, classes) and one integer label per sample."
        )
    if not logits.numel():
        raise OptionError(
            f"{name}: logits {tuple(logits.shape)} are empty: at least one sample and one class are needed."
        )
    logits = logits.detach().cpu().double()
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        raise OptionError(
            f"{name}: logits of sample {int(finite.int().argmin())} are not finite: check the model's weights and "
            "inputs, or compute in float32."
        )
    return logits, labels.detach().cpu().long()


def _check_labels(name: str, labels: Tensor, classes: int) -> None:
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
        raise OptionError(f"{name}: label {int(bad[0])} lies outside [0, {classes}): map the labels to 0..classes-1.")


def _counts(name: str, labels: Tensor, classes: int) -> Tensor:
    _check_labels(name, labels, classes)
    counts = labels.bincount(minlength=classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise OptionError(
            f"{name}: no samples of target class {', '.join(map(str, empty[:5]))}{', ...' if empty[5:] else ''} "
            f"(classes={classes}): add some, since every class needs at least one training sample."
        )
    return counts


def _log_source(name: str, logits: Tensor, temperature: float) -> Tensor:
    if not (math.isfinite(temperature) and temperature > 0):
        raise OptionError(
            f"{name}: temperature={temperature!r} must be a positive number; 1 leaves the logits unchanged."
        )
    return (logits / temperature).log_softmax(dim=1)
