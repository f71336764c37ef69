r"""A linear probe fitted by logistic regression on recorded features, in place of gradient steps.

.. math:: \min_{W, b} \; C \sum_n \mathrm{CE}(W x_n + b, \, y_n) + \tfrac12 \lVert W \rVert^2, \qquad
    x = (f - m) / s

f are the inputs of the head, m and s the mean and standard deviation of all their entries. Of 50 values of C, the one
with the best held-out accuracy is used.

Reference: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context, State
from hf_ft.core.head_rate import describe_head_rate, measure_head_rate
from hf_ft.core.state_checks import LARGEST, check_tensor
from hf_ft.engine.frozen.features import RecordedFeatures
from hf_ft.engine.frozen.record import batches_of
from hf_ft.errors import OptionError
from hf_ft.models.feature_hooks import INPUT
from hf_ft.models.names import Names
from hf_ft.splits import hold_out

STRENGTHS = np.logspace(-7, 2, 50)  # values of C, as in the authors' code
ITERATIONS = 20  # of L-BFGS for each, starting from the previous solution, as in their code
HELD_OUT = 0.2  # fraction of the training samples that chooses C; the authors use their validation data
WEIGHT, BIAS = "probe.weight", "probe.bias"


@dataclass(frozen=True)
class SetHead:
    """Surgery: set weight and bias of the head's linear layer."""

    layer: str
    # Excluded from comparison: the truth value of a tensor is ambiguous.
    weight: Tensor = field(compare=False, repr=False)
    bias: Tensor = field(compare=False, repr=False)

    @property
    def sets(self) -> Names:
        return (self.layer,)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        head: Any = model.get_submodule(self.layer)
        head.weight.copy_(self.weight)
        if head.bias is not None:
            head.bias.copy_(self.bias)
        return model


def linear_head(model: nn.Module, config: FTConfig) -> str:
    """The name of the head's only layer with weights, a linear one.

    Raises:
        OptionError: if the head has another form.
    """
    names = [
        name
        for prefix in config.anatomy(model).head.modules
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if next(module.parameters(recurse=False), None) is not None
    ]
    if len(names) != 1 or not isinstance(model.get_submodule(names[0]), nn.Linear):
        raise OptionError(
            f"{config.ft_type}: probe_solver='lbfgs' needs a head of one linear layer; this one has the layers "
            f"{', '.join(names)}. Set probe_solver='sgd'."
        )
    return names[0]


def measure_probe(model: nn.Module, config: FTConfig, context: Context) -> State:
    """Fit the head on the features of all training samples.

    Raises:
        OptionError: if the head is not a single linear layer of pooled features, or samples do not have one class each.
    """
    layer = linear_head(model, config)
    recorded = RecordedFeatures(model, INPUT + layer, context)
    read = [recorded(rows)[:2] for rows in batches_of(recorded.count)]
    features, labels = (torch.cat([part[i].cpu() for part in read]) for i in range(2))
    if features.dim() == 3 and features.shape[1] == 1:
        features = features.squeeze(1)
    if features.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(
            f"{config.ft_type}: probe_solver='lbfgs' needs one vector of features and one class per sample, not "
            f"{tuple(features.shape[1:])} and {tuple(labels.shape[1:])}. Set probe_solver='sgd'."
        )
    head: Any = model.get_submodule(layer)
    weights = context.recipe.task_loss.class_weights
    probe = logistic_probe(features, labels, head.out_features, class_weights=weights, groups=context.groups)
    info = {"C": probe.strength, "accuracy": probe.accuracy, "held_out": probe.held_out}
    return State({WEIGHT: probe.weight, BIAS: probe.bias}, info)


def check_probe(model: nn.Module, config: FTConfig, state: State) -> None:
    """Reject a fitted probe that does not fit this model's head.

    Raises:
        OptionError: naming the tensor.
    """
    head: Any = model.get_submodule(linear_head(model, config))
    shapes = {WEIGHT: (head.out_features, head.in_features), BIAS: (head.out_features,)}
    for name in set(shapes) & set(state.tensors):
        check_tensor(name, state.tensors[name], shapes[name], least=-LARGEST, most=LARGEST)


def measure_head(model: nn.Module, config: Any, context: Context) -> State:
    """The measurement of a strategy with a probe: the fitted head, or the rate at which the optimizer will train it."""
    if config.probe_solver == "lbfgs":
        return measure_probe(model, config, context)
    return State(info=measure_head_rate(config, model, context))


def describe_head(state: State) -> str:
    """The result of :func:`measure_head` as a sentence."""
    return describe_probe(state) or describe_head_rate(state)


def describe_probe(state: State) -> str:
    """The fitted probe as a sentence."""
    if "C" not in state.info:
        return ""
    return (
        f"The head was fitted by logistic regression with C = {state.info['C']:.3g}, which has an accuracy of "
        f"{state.info['accuracy']:.3f} on {state.info['held_out']} held-out training samples."
    )


def set_head(model: nn.Module, config: FTConfig, state: State) -> SetHead:
    """The surgery that sets the head to the fitted probe.

    Raises:
        OptionError: if no probe was fitted.
    """
    if WEIGHT not in state.tensors:
        raise OptionError(
            f"{config.ft_type}: the state holds no probe. Measure first (pass a context to set_up), or set "
            "probe_solver='sgd'."
        )
    return SetHead(linear_head(model, config), state.tensors[WEIGHT], state.tensors[BIAS])


@dataclass(frozen=True)
class Probe:
    """A linear classifier: logits ``x @ weight.T + bias``.

    Attributes:
        weight: (classes, d).
        bias: (classes,).
        strength: the chosen C.
        accuracy: accuracy with C on the held-out samples.
        held_out: number of held-out samples.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    accuracy: float
    held_out: int


def logistic_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    class_weights: Tensor | None = None,
    groups: np.ndarray | None = None,
) -> Probe:
    """Choose C on held-out samples, then fit all samples with it.

    Args:
        features: (N, d).
        labels: (N,), in [0, classes); -100 means no label.
        class_weights: (classes,), weights of the samples' losses.
        groups: (N,), numbers of groups that are held out as a whole.

    Raises:
        OptionError: if all samples, or all that are not held out, belong to one class or one group.
    """
    known = labels != -100
    x, y = features[known].double().numpy(), labels[known].numpy()
    mean, spread = x.mean(), x.std() or 1.0
    x = (x - mean) / spread
    present = np.unique(y)
    if len(present) < 2:
        raise OptionError("probe_solver='lbfgs' needs samples of at least two classes.")
    size = max(round(HELD_OUT * len(y)), len(present))
    if size >= len(y):
        raise OptionError(
            f"probe_solver='lbfgs' holds out {size} samples, and there are only {len(y)}. Use more, or set "
            "probe_solver='sgd'."
        )
    rows = hold_out(len(y), size, y, None if groups is None else groups[known.numpy()])
    if len(np.unique(y[rows[0]])) < 2:
        raise OptionError(
            f"probe_solver='lbfgs': without the {len(rows[1])} samples that are held out, only one class is left. Use "
            "more samples or groups of each class, or set probe_solver='sgd'."
        )
    weights = None if class_weights is None else {int(c): float(class_weights[c]) for c in present}
    path = _path(x[rows[0]], y[rows[0]], len(STRENGTHS), weights)
    accuracies = [fit.accuracy(x[rows[1]], y[rows[1]]) for fit in path]
    best = int(np.argmax(accuracies))  # the first among equals: the strongest penalty
    fit = _path(x, y, best + 1, weights)[-1]
    weight, bias = (
        np.zeros((classes, x.shape[1])),
        np.full(classes, fit.intercepts.min()),
    )  # for classes without samples
    weight[present] = fit.coefficients / spread
    bias[present] = fit.intercepts - fit.coefficients.sum(axis=1) * mean / spread
    found = torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
    return Probe(*found, float(STRENGTHS[best]), accuracies[best], len(rows[1]))


@dataclass(frozen=True)
class _Fit:
    """A solution: scores ``x @ coefficients.T + intercepts``, for the classes of the regression."""

    regression: LogisticRegression
    coefficients: np.ndarray
    intercepts: np.ndarray

    def accuracy(self, x: np.ndarray, y: np.ndarray) -> float:
        scores = x @ self.coefficients.T + self.intercepts
        return float((self.regression.classes_[scores.argmax(axis=1)] == y).mean())


def _path(x: np.ndarray, y: np.ndarray, count: int, class_weights: dict[int, float] | None) -> list[_Fit]:
    """Solutions for the first ``count`` values of C, each started from the one before it."""
    regression = LogisticRegression(warm_start=True, max_iter=ITERATIONS, class_weight=class_weights)
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few iterations each: the next value continues from there
        for strength in STRENGTHS[:count]:
            regression.set_params(C=strength).fit(x, y)
            weight, bias = regression.coef_.copy(), regression.intercept_.copy()
            if len(weight) == 1:  # for two classes, scikit-learn fits the difference of the two rows
                weight, bias = np.concatenate((-weight / 2, weight / 2)), np.concatenate((-bias / 2, bias / 2))
            fits.append(_Fit(regression, weight, bias))
    return fits
