"""Metrics for ``Trainer(compute_metrics=...)``, computed locally with scikit-learn.

``evaluate.load("accuracy")`` downloads a script and runs it, and fails offline. The metrics below are
``evaluate.Metric`` subclasses with the same interface and need no network. Only other names passed to
:func:`compute_metrics` go through ``evaluate.load``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
from sklearn import metrics as sk
from transformers import EvalPrediction

from hf_ft.errors import OptionError

Kind = Literal["single_label", "multi_label", "regression"]
Scores = dict[str, float]

_CLASSES = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
_MULTI_HOT = datasets.Features(
    predictions=datasets.List(datasets.Value("int64")), references=datasets.List(datasets.Value("int64"))
)
_NUMBERS = datasets.Features(predictions=datasets.Value("float64"), references=datasets.Value("float64"))
_VECTORS = datasets.Features(
    predictions=datasets.List(datasets.Value("float64")), references=datasets.List(datasets.Value("float64"))
)


class _LocalMetric(evaluate.Metric):
    """A scikit-learn function as an ``evaluate.Metric``; the subclasses below declare only data.

    ``evaluate`` picks the first of ``feature_options`` that fits the batch.
    """

    key: str
    kinds: tuple[Kind, ...]
    function: Callable[..., Any]  # takes (references, predictions), scikit-learn's order
    feature_options: tuple[datasets.Features, ...]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)  # two ranks must not share one cache file

    def _build_data_dir(self) -> str:
        return ""  # nothing is written, so create no folder: a read-only home must not stop a run

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(self.__doc__ or "").split("\n")[0],
            citation="",
            inputs_description="",
            features=list(self.feature_options),
        )

    def _compute(self, predictions: Any, references: Any) -> Scores:
        return {self.key: _rounded(type(self).function(np.asarray(references), np.asarray(predictions)))}


def _rounded(score: float) -> float:
    """To 12 digits. Beyond them, a mean depends on the order of the class scores, which would decide between ties."""
    return float(f"{score:.12g}")


def _mean_recall(references: Any, predictions: Any) -> float:
    present = np.unique(references)
    return float(sk.recall_score(references, predictions, labels=present, average="macro", zero_division=0))


class Accuracy(_LocalMetric):
    """Share of correct predictions; for multi-label, share of rows with every label correct (subset accuracy)."""

    key = "accuracy"
    kinds = ("single_label", "multi_label")
    function = sk.accuracy_score
    feature_options = (_CLASSES, _MULTI_HOT)


class BalancedAccuracy(_LocalMetric):
    """Mean recall over the classes that occur in the references.

    Equal to ``sklearn.metrics.balanced_accuracy_score``, but computed as macro recall over the classes present: a
    class that is predicted but absent from the references (common in small validation splits) has no recall and is
    ignored without the warning that scikit-learn's function emits each time.
    """

    key = "balanced_accuracy"
    kinds = ("single_label",)
    function = _mean_recall
    feature_options = (_CLASSES,)


class MacroF1(_LocalMetric):
    """Unweighted mean of the F1 scores of the classes that occur in the references or the predictions.

    A class without a correct prediction scores 0 (``zero_division=0``), without a warning.
    """

    key = "macro_f1"
    kinds = ("single_label", "multi_label")
    function = partial(sk.f1_score, average="macro", zero_division=0)
    feature_options = (_CLASSES, _MULTI_HOT)


class MeanSquaredError(_LocalMetric):
    """Mean squared error."""

    key = "mse"
    kinds = ("regression",)
    function = sk.mean_squared_error
    feature_options = (_NUMBERS, _VECTORS)


class MeanAbsoluteError(_LocalMetric):
    """Mean absolute error."""

    key = "mae"
    kinds = ("regression",)
    function = sk.mean_absolute_error
    feature_options = (_NUMBERS, _VECTORS)


LOCAL_METRICS: dict[str, type[_LocalMetric]] = {
    metric.key: metric for metric in (Accuracy, BalancedAccuracy, MacroF1, MeanSquaredError, MeanAbsoluteError)
}


def _first(value: Any) -> np.ndarray:
    return np.asarray(value[0] if isinstance(value, tuple | list) else value)


def predictions_and_references(eval_prediction: EvalPrediction) -> tuple[Kind, np.ndarray, np.ndarray]:
    """Convert the Trainer's logits and labels to a metric's inputs, and determine the kind of task.

    One output column means regression, as in Transformers. Labels with the shape of the logits are multi-label if
    they are all 0 or 1 (logits are thresholded at 0, i.e. at probability 0.5), otherwise regression. Everything else
    is single-label; samples without a label (-100) are then left out.

    Args:
        eval_prediction: logits (B, C) or (B, 1, C), or a tuple that starts with them; labels (B,) or (B, C).

    Raises:
        OptionError: if the shapes fit none of these kinds.
    """
    logits, labels = _first(eval_prediction.predictions), _first(eval_prediction.label_ids)
    if logits.ndim == 3 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.ndim == 1 or (logits.shape[-1] == 1 and labels.size == logits.size):
        return "regression", logits.reshape(-1), labels.reshape(-1)
    if logits.shape == labels.shape:
        if np.isin(labels, (0, 1)).all():
            return "multi_label", (logits > 0).astype(np.int64), labels.astype(np.int64)
        return "regression", logits, labels
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise OptionError(
            f"cannot score logits of shape {logits.shape} against labels of shape {labels.shape}: "
            "expected logits (B, C) with labels (B,) or (B, C)"
        )
    known = labels != -100  # as in cross-entropy
    return "single_label", logits.argmax(-1)[known], labels[known].astype(np.int64)


def _local_score(metric: type[_LocalMetric], predictions: np.ndarray, references: np.ndarray) -> float:
    """The result of ``metric().compute`` without its Arrow table, which takes most of a small evaluation's time."""
    exact = (x.astype(np.float64) if x.dtype.kind == "f" else x for x in (references, predictions))
    return _rounded(metric.function(*exact))


def classification_metrics(eval_prediction: EvalPrediction) -> Scores:
    """Compute the metrics of one evaluation, for ``Trainer(compute_metrics=classification_metrics)``.

    Returns:
        ``accuracy``, ``balanced_accuracy`` and ``macro_f1``; without ``balanced_accuracy`` for multi-label;
        ``mse`` and ``mae`` for regression; none if no sample has a label.
    """
    return local_scores(*predictions_and_references(eval_prediction))


def local_scores(kind: Kind, predictions: np.ndarray, references: np.ndarray) -> Scores:
    """All local metrics for this kind of task: of classes (B,), zeros and ones (B, C), or numbers."""
    if not len(references):
        return {}
    return {name: _local_score(LOCAL_METRICS[name], predictions, references) for name in fitting_metrics(kind)}


def fitting_metrics(kind: Kind) -> list[str]:
    """Names of the local metrics for this kind of task."""
    return [name for name, metric in LOCAL_METRICS.items() if kind in metric.kinds]


def _load(name: str) -> evaluate.EvaluationModule:
    if name in LOCAL_METRICS:
        return LOCAL_METRICS[name]()
    try:
        return evaluate.load(name)
    except Exception as error:  # the Hub, the file system and the metric's own imports fail in many ways
        raise OptionError(
            f"metric {name!r} could not be loaded ({type(error).__name__}: {error}); "
            f"these need no download: {', '.join(LOCAL_METRICS)}"
        ) from error


def compute_metrics(names: Sequence[str]) -> Callable[[EvalPrediction], Scores]:
    """Build a ``compute_metrics`` function for the Trainer from metric names.

    Args:
        names: local names (see ``LOCAL_METRICS``), or any other name known to ``evaluate.load``. The latter runs code
            from the Hub, so only name what you trust.

    Raises:
        OptionError: if a name is neither local nor loadable (immediately), or if a local metric does not suit the task
            (at the first evaluation).
    """
    modules = {name: _load(name) for name in names}

    def compute(eval_prediction: EvalPrediction) -> Scores:
        kind, predictions, references = predictions_and_references(eval_prediction)
        scores: Scores = {}
        for name, module in modules.items():
            if name in LOCAL_METRICS and kind not in LOCAL_METRICS[name].kinds:
                fitting = ", ".join(fitting_metrics(kind))
                raise OptionError(f"metric {name!r} does not suit a {kind} task; these do: {fitting}")
            if not len(references):
                continue
            if name in LOCAL_METRICS:
                scores[name] = _local_score(LOCAL_METRICS[name], predictions, references)
            else:
                scores |= module.compute(predictions=predictions, references=references) or {}
        return scores

    return compute
