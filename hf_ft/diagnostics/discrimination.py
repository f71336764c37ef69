"""General discrimination: how well a model's features separate classes it was never trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances_argmin
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_ft.documents.figure import new_figure
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.feature_hooks import Taps, model_inputs
from hf_ft.models.preserve import observing, random_states_kept

__all__ = ["Discrimination", "GeneralDiscriminationCallback", "general_discrimination", "plot_discrimination"]

logger = logging.get_logger(__name__)
FIGURES = {"linear_probe": "linear probe", "nearest_class_mean": "nearest class mean"}


@dataclass(frozen=True)
class Discrimination:
    """How well features separate classes, as accuracies on held-out samples.

    Attributes:
        linear_probe: accuracy of a logistic regression on standardised features.
        nearest_class_mean: accuracy of the nearest class mean, by Euclidean distance.
        samples: number of samples.
        classes: number of classes.
    """

    linear_probe: float
    nearest_class_mean: float
    samples: int
    classes: int


class _Diverged(OptionError):
    """Raised if features are not finite."""


def general_discrimination(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    folds: int = 5,
    seed: int = 0,
    head: str | None = None,
    blocks: str | None = None,
) -> Discrimination:
    """Cross-validated accuracy of simple classifiers on a model's frozen features.

    ``accuracy = 1/N sum_i [c_k(i)(f_i) = y_i]``, where f_i is the input of the head and c_k(i) was fitted without
    sample i's fold; folds are stratified. Use classes that the model was never trained on: its training classes show
    what it has learned, not what it can still separate. The model runs in eval mode; modes and RNG states are restored
    on exit.

    Args:
        model: a classifier, for any classes.
        loader: batches as dictionaries of the model's keyword arguments, with "labels" (B,), any integers.
        folds: number of folds; each class needs at least as many samples.
        seed: seed of the folds and of the loader's random draws, so that two measurements see the same samples.
        head: see :func:`hf_ft.models.anatomy`.
        blocks: see :func:`hf_ft.models.anatomy`.

    Returns:
        The accuracies over all samples.

    Raises:
        OptionError: if there are no samples or labels, or too few classes or samples of a class, or if the input of
            the head is not one finite vector per sample.
    """
    if folds < 2:
        raise OptionError(f"general_discrimination: folds={folds!r} leaves nothing to fit on. Default: 5.")
    # Fitted in float64: with features far from zero, a float32 mean loses the differences between classes.
    features, labels = (values.numpy() for values in _collect(model, loader, seed, head, blocks))
    _check_classes(labels, folds)
    broken = int((~np.isfinite(features).all(axis=1)).sum())
    if broken:
        raise _Diverged(
            f"general_discrimination: the features of {broken} of {len(labels)} samples are not finite: the model has "
            "diverged. Lower its learning rate."
        )
    classifiers = {
        "linear_probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "nearest_class_mean": _NearestMean(),
    }
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracies = {
        name: float((cross_val_predict(classifier, features, labels, cv=splitter) == labels).mean())
        for name, classifier in classifiers.items()
    }
    return Discrimination(**accuracies, samples=len(labels), classes=len(np.unique(labels)))


def plot_discrimination(histories: Mapping[str, list[tuple[int, dict[str, Discrimination]]]], file: str | Path) -> None:
    """Plot both accuracies over the training steps, with a colour per run and a line style per loader.

    Args:
        histories: the ``history`` of each run's callback by name, such as ``{"soft": ..., "full": ...}``.
        file: output file; its suffix determines the format.

    Raises:
        OptionError: if nothing was measured.
        ImportError: if matplotlib is not installed.
    """
    loaders = list(dict.fromkeys(name for history in histories.values() for _, results in history for name in results))
    if not loaders:
        raise OptionError("plot_discrimination: the histories contain no measurements. Train with the callback first.")
    figure = new_figure("plot_discrimination")
    axes = figure.subplots(1, 2)
    for axis, (field, title) in zip(axes, FIGURES.items(), strict=True):
        for color, (run, history) in enumerate(histories.items()):
            for number, name in enumerate(loaders):
                points = [(step, getattr(results[name], field)) for step, results in history if name in results]
                if points:
                    label = run if len(loaders) == 1 else f"{run}, {name}"
                    look = {"color": f"C{color}", "linestyle": ("-", "--", ":", "-.")[number % 4], "marker": "."}
                    axis.plot(*zip(*points, strict=True), label=label, **look)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize="small")
    figure.savefig(file)


class GeneralDiscriminationCallback(TrainerCallback):
    """Measure at each evaluation, and before the first step, how well the features separate other classes.

    Adds ``discrimination/<name>/linear_probe`` and ``discrimination/<name>/nearest_class_mean`` to the evaluation's
    metrics and to the log; ``history`` holds all measurements. If the model has diverged, the values are NaN: a
    measurement never aborts a run.

    Args:
        loaders: re-iterable batches by name, such as ``{"flowers": ...}``.
        folds: see :func:`general_discrimination`.
        seed: see :func:`general_discrimination`.
        head: see :func:`hf_ft.models.anatomy`.
        blocks: see :func:`hf_ft.models.anatomy`.

    Attributes:
        history: the step of each measurement, and its results by loader name. Step 0 measures the pretrained
            features; a resumed run does not have it.

    Raises:
        OptionError: if the loaders have no names.
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Mapping[str, Any]]],
        *,
        folds: int = 5,
        seed: int = 0,
        head: str | None = None,
        blocks: str | None = None,
    ) -> None:
        if not isinstance(loaders, Mapping):
            raise OptionError(
                f"GeneralDiscriminationCallback: loaders is a {type(loaders).__name__}: give each a name, "
                'such as {"flowers": loader}.'
            )
        self.loaders = dict(loaders)
        self.history: list[tuple[int, dict[str, Discrimination]]] = []
        self._measure = partial(general_discrimination, folds=folds, seed=seed, head=head, blocks=blocks)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # With eval_on_start, an evaluation follows at this step anyway.
        if state.global_step == 0 and state.is_world_process_zero and not args.eval_on_start:
            self._record(state, model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            figures = self._record(state, model)
            if metrics is not None:
                metrics.update(figures)

    def _record(self, state: Any, model: nn.Module) -> dict[str, float]:
        results = {name: self._measured(name, model, loader) for name, loader in self.loaders.items()}
        self.history.append((state.global_step, results))
        figures = {f"discrimination/{n}/{field}": getattr(d, field) for n, d in results.items() for field in FIGURES}
        # The evaluation's own entry has been logged already.
        state.log_history.append({"epoch": state.epoch, **figures, "step": state.global_step})
        return figures

    def _measured(self, name: str, model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> Discrimination:
        try:
            return self._measure(model, loader)
        except _Diverged as error:
            logger.warning(f"discrimination/{name}: {error}")
            return Discrimination(math.nan, math.nan, samples=0, classes=0)


class _NearestMean(ClassifierMixin, BaseEstimator):
    """Nearest class mean; the first among equals.

    Its predictions equal those of scikit-learn's NearestCentroid, which rejects constant features (a collapsed
    network) and warns about each dead channel.
    """

    def fit(self, features: np.ndarray, labels: np.ndarray) -> _NearestMean:
        self.classes_ = np.unique(labels)
        self.means_ = np.stack([features[labels == label].mean(axis=0) for label in self.classes_])
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self.classes_[pairwise_distances_argmin(features, self.means_)]


def _collect(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], seed: int, head: str | None, blocks: str | None
) -> tuple[Tensor, Tensor]:
    """Features (N, d) and labels (N,) of all samples, on the CPU."""
    modules = anatomy(model, head=head, blocks=blocks).head.modules
    with observing(model), random_states_kept(seed):
        batches = list(_batches(model, loader, modules))
    if not sum(len(labels) for _, labels in batches):
        raise OptionError("general_discrimination: the loader yielded no samples (an iterator can only be used once).")
    features, labels = zip(*batches, strict=True)
    return torch.cat(features).double(), torch.cat(labels)


def _batches(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], head: tuple[str, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for batch in loader:
        inputs = model_inputs(batch, device)  # labels are not classes of the head: no loss is defined
        labels = _labels(batch)
        with Taps(model, head=head) as taps:
            model(**inputs)
        features = taps.features
        if features is None or features.dim() != 2 or len(features) != len(labels):
            shape = None if features is None else tuple(features.shape)
            raise OptionError(
                f"general_discrimination: the head's input is {shape}, not one vector for each of {len(labels)} "
                "samples: set head=... to a module with such an input."
            )
        yield features.float().cpu(), labels


def _labels(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a batch, (B,)."""
    if "labels" not in batch:
        raise OptionError(
            f"general_discrimination: a batch has no 'labels', only {', '.join(map(repr, batch))}: give each sample's "
            "class under that name."
        )
    labels = torch.as_tensor(batch["labels"]).cpu()
    if labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(
            f"general_discrimination: labels are {labels.dtype} of shape {tuple(labels.shape)}: give one integer per "
            "sample, its class."
        )
    return labels.long()


def _check_classes(labels: np.ndarray, folds: int) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise OptionError(
            f"general_discrimination: all {len(labels)} samples belong to class {classes[0]}: at least two classes are "
            "needed."
        )
    rarest, fewest = classes[counts.argmin()], int(counts.min())
    if fewest < folds:
        fewer = f", or set folds={fewest}" if fewest > 1 else " or remove it"
        raise OptionError(
            f"general_discrimination: class {rarest} has {fewest} sample{'s' * (fewest > 1)}, fewer than "
            f"folds={folds}: add more{fewer}."
        )
