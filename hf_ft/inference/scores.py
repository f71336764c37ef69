"""Scores of predictions against labels, collected as the predictions are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_ft.data.inputs import Wanted
from hf_ft.documents.confusion import Confusion
from hf_ft.errors import OptionError
from hf_ft.inference.calibration import Bin, expected_calibration_error, reliability
from hf_ft.inference.predictor import Prediction
from hf_ft.metrics import Kind, Scores, local_scores

LEAST = np.finfo(np.float64).tiny  # a probability of 0 would have an infinite logarithm
KINDS: dict[str, Kind] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


@dataclass
class Scorer:
    """Collects predictions and labels; for each sample, only what the scores need.

    Attributes:
        threshold: probability above which one of several labels is predicted.
        unreadable: row or file, and the reason, of each sample that cannot be read.
        rows: number of all samples.
    """

    wanted: Wanted
    threshold: float = 0.5
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    rows: int = 0
    _answers: list[Any] = field(default_factory=list)
    _labels: list[Any] = field(default_factory=list)
    _confidences: list[float] = field(default_factory=list)
    _log_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise OptionError(f"threshold={self.threshold}: set it between 0 and 1.", arguments=("threshold",))

    def watch(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Pass predictions on, and collect them."""
        for prediction in predictions:
            self.see(prediction)
            yield prediction

    def see(self, prediction: Prediction) -> None:
        """Collect one prediction; those without a label are only counted."""
        self.rows += 1
        outputs, label = prediction.outputs, prediction.label
        if outputs is None:
            self.unreadable.append((prediction.file or f"row {prediction.row}", prediction.error))
        elif label is not None:
            self._labels.append(np.asarray(label, np.uint8) if isinstance(label, list) else label)
            self._answers.append(self._answer(outputs))
            if self.wanted.problem_type == "single_label_classification":
                self._confidences.append(float(outputs.max()))
                self._log_loss -= float(np.log(max(outputs[label], LEAST)))

    @property
    def scored(self) -> int:
        """The number of samples that could be read and have a label."""
        return len(self._labels)

    def scores(self) -> Scores:
        """All local metrics, with ``log_loss`` and ``ece`` for single classes; empty without labels."""
        if not self.scored:
            return {}
        found = local_scores(KINDS[self.wanted.problem_type], np.stack(self._answers), np.stack(self._labels))
        if not self._confidences:
            return found
        return found | {
            "log_loss": self._log_loss / self.scored,
            "ece": expected_calibration_error(*self.confidences()),
        }

    def confusion(self, split: str) -> Confusion | None:
        """The confusion matrix; None without labels, or if there is not one class per sample."""
        if not self._confidences:
            return None
        return Confusion.of(split, self.wanted.names, self._labels, self._answers)

    def confidences(self) -> tuple[np.ndarray, np.ndarray]:
        """The probability (N,) of each predicted class, and whether (N,) it is the true one."""
        return np.asarray(self._confidences), np.asarray(self._answers) == np.asarray(self._labels)

    def bins(self) -> list[Bin]:
        """Accuracy by confidence; empty unless there is one class per sample."""
        return reliability(*self.confidences()) if self._confidences else []

    def _answer(self, outputs: np.ndarray) -> Any:
        kind = self.wanted.problem_type
        if kind == "multi_label_classification":
            return (outputs > self.threshold).astype(np.uint8)
        return int(outputs.argmax()) if kind == "single_label_classification" else _number(outputs)


def _number(outputs: np.ndarray) -> Any:
    return float(outputs[0]) if len(outputs) == 1 else outputs
