"""How well a model's features tell classes apart that it was never trained on: general discrimination."""

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
    """How well features tell classes apart, as accuracies over samples that were left out.

    Attributes:
        linear_probe: of a logistic regression on standardised features.
        nearest_class_mean: of the class whose mean is nearest, by Euclidean distance.
        samples: how many there were.
        classes: how many there were.
    """

    linear_probe: float
    nearest_class_mean: float
    samples: int
    classes: int


class _Diverged(OptionError):
    """Features are not finite."""


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

    ``accuracy = 1/N sum_i [c_k(i)(f_i) = y_i]``, where f_i goes into the head and c_k(i) was fitted without sample
    i's fold; folds are stratified. Take classes that the model was never trained on: its own show what it has
    learned, not what it can still tell apart. It runs in eval mode; modes and random states are as before afterwards.

    Args:
        model: a classifier, of whatever classes.
        loader: batches as dictionaries of the model's keyword arguments, with "labels" (B,), any integers.
        folds: how many; each class needs as many samples.
        seed: of the folds, and of whatever the loader draws, so that two measurements see the same samples.
        head: as for :func:`hf_ft.models.anatomy`.
        blocks: as for :func:`hf_ft.models.anatomy`.

    Returns:
        The accuracies over all samples.

    Raises:
        OptionError: no sample, no labels, or too few classes or samples of a class; what goes into the head is not
            one vector per sample, or not finite.
    """
    if folds < 2:
        raise OptionError(f"general_discrimination: folds={folds!r} leaves nothing to fit on. Default: 5.")
    # Fitted in float64: a float32 mean of features far from zero loses what tells classes apart.
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
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracies = {
        name: float((cross_val_predict(classifier, features, labels, cv=split) == labels).mean())
        for name, classifier in classifiers.items()
    }
    return Discrimination(**accuracies, samples=len(labels), classes=len(np.unique(labels)))


def plot_discrimination(histories: Mapping[str, list[tuple[int, dict[str, Discrimination]]]], file: str | Path) -> None:
    """Draw both accuracies over the training steps, a colour for each run and a line style for each loader.

    Args:
        histories: by name, such as ``{"soft": ..., "full": ...}``, the ``history`` of each run's callback.
        file: to write; its ending says the format.

    Raises:
        OptionError: nothing was measured.
        ImportError: matplotlib is not installed.
    """
    loaders = list(dict.fromkeys(name for history in histories.values() for _, found in history for name in found))
    if not loaders:
        raise OptionError("plot_discrimination: the histories hold no measurement. Train with the callback first.")
    figure = new_figure("plot_discrimination")
    axes = figure.subplots(1, 2)
    for axis, (field, title) in zip(axes, FIGURES.items(), strict=True):
        for color, (run, history) in enumerate(histories.items()):
            for number, name in enumerate(loaders):
                points = [(step, getattr(found[name], field)) for step, found in history if name in found]
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
    """Measures at each evaluation, and before the first step, how well the features tell other classes apart.

    It adds ``discrimination/<name>/linear_probe`` and ``discrimination/<name>/nearest_class_mean`` to the evaluation's
    metrics and to the log; ``history`` holds all of it. Where the model has diverged, they are NaN: a measurement
    ends no run.

    Args:
        loaders: by name, such as ``{"flowers": ...}``, batches that can be passed over again and again.
        folds: as for :func:`general_discrimination`.
        seed: as for :func:`general_discrimination`.
        head: as for :func:`hf_ft.models.anatomy`.
        blocks: as for :func:`hf_ft.models.anatomy`.

    Attributes:
        history: for each measurement its step, and what was found by name. Step 0 is what the pretrained features
            can do; a resumed run has none.

    Raises:
        OptionError: the loaders have no names.
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
        # With eval_on_start, an evaluation follows at this step.
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
        found = {name: self._measured(name, model, loader) for name, loader in self.loaders.items()}
        self.history.append((state.global_step, found))
        figures = {f"discrimination/{n}/{field}": getattr(d, field) for n, d in found.items() for field in FIGURES}
        # The evaluation's own entry is in the log already.
        state.log_history.append({"epoch": state.epoch, **figures, "step": state.global_step})
        return figures

    def _measured(self, name: str, model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> Discrimination:
        try:
            return self._measure(model, loader)
        except _Diverged as error:
            logger.warning(f"discrimination/{name}: {error}")
            return Discrimination(math.nan, math.nan, samples=0, classes=0)


class _NearestMean(ClassifierMixin, BaseEstimator):
    """The class whose mean is nearest; the first of equals.

    It predicts what scikit-learn's NearestCentroid does, which refuses features that are all alike (a collapsed
    network) and warns of each channel that is dead.
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
        found = list(_batches(model, loader, modules))
    if not sum(len(labels) for _, labels in found):
        raise OptionError("general_discrimination: the loader holds no sample (an iterator can be passed over once).")
    features, labels = zip(*found, strict=True)
    return torch.cat(features).double(), torch.cat(labels)


def _batches(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], head: tuple[str, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for batch in loader:
        inputs = model_inputs(batch, device)  # labels are none of the head's classes: no loss is defined
        labels = _labels(batch)
        with Taps(model, head=head) as taps:
            model(**inputs)
        features = taps.features
        if features is None or features.dim() != 2 or len(features) != len(labels):
            shape = None if features is None else tuple(features.shape)
            raise OptionError(
                f"general_discrimination: what goes into the head is {shape}, not one vector for each of "
                f"{len(labels)} samples: name the module that takes such with head=..."
            )
        yield features.float().cpu(), labels


def _labels(batch: Mapping[str, Any]) -> Tensor:
    """A batch's labels, (B,)."""
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
            f"general_discrimination: all {len(labels)} samples are of class {classes[0]}: two classes are needed at "
            "least."
        )
    rarest, fewest = classes[counts.argmin()], int(counts.min())
    if fewest < folds:
        fewer = f", or set folds={fewest}" if fewest > 1 else " or leave it out"
        raise OptionError(
            f"general_discrimination: class {rarest} has {fewest} sample{'s' * (fewest > 1)}, fewer than "
            f"folds={folds}: give more of it{fewer}."
        )
