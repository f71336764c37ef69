r"""How far probabilities are frequencies, and the temperature that brings them closer.

Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.documents.files import write_whole
from hf_ft.errors import CheckpointError, DataError
from hf_ft.functional import calibrated_log_loss
from hf_ft.records import read_json, restored, stored

FILE = "ft_calibration.json"
BINS = 15  # as in the paper
LOWEST, HIGHEST = 0.05, 20.0  # beyond, the samples say no more than that all answers are right, or that none is sure
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Bin:
    """Samples of similar confidence.

    Attributes:
        samples: their number.
        confidence: the mean probability of the predicted class.
        accuracy: the share of right predictions.
    """

    samples: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> list[Bin]:
    r"""Accuracy by confidence, in bins of equal width :math:`(\frac{m-1}{M}, \frac{m}{M}]`; empty ones are left out.

    Args:
        confidence: (N,), the probability of each predicted class.
        correct: (N,), whether it is the true one.
    """
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    groups = [places == number for number in range(bins)]
    return [
        Bin(int(group.sum()), float(confidence[group].mean()), float(correct[group].mean()))
        for group in groups
        if group.any()
    ]


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    r"""The mean difference of accuracy and confidence, :math:`\sum_m \frac{|B_m|}{N} \, |acc(B_m) - conf(B_m)|`.

    Args:
        confidence: (N,), the probability of each predicted class.
        correct: (N,), whether it is the true one.
    """
    found = reliability(confidence, correct, bins)
    return sum(one.samples * abs(one.accuracy - one.confidence) for one in found) / max(1, len(confidence))


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it was fitted on.

    Attributes:
        temperature: by which logits are divided before the softmax.
        data: name of the data.
        rows: number of their samples.
        log_loss: before and after.
        ece: expected calibration error, before and after.
        weights: hash of the weights that it belongs to.
    """

    temperature: float
    data: str
    rows: int
    log_loss: tuple[float, float]
    ece: tuple[float, float]
    weights: str

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise CheckpointError(f"temperature={self.temperature} is not above 0.")

    @classmethod
    def fitted(cls, logits: Tensor, labels: Tensor, data: str, weights: str) -> Calibration:
        r"""The temperature, between 0.05 and 20, of the lowest log loss: :math:`\arg\min_T \mathrm{CE}(z / T, y)`.

        Args:
            logits: (N, C), of samples that the classifier was not trained on.
            labels: (N,).

        Raises:
            DataError: if there are no samples, or logits are not finite.
        """
        if not len(labels) or not bool(logits.isfinite().all()):
            raise DataError(f"{data}: a temperature needs samples with finite logits, and there are {len(labels)}.")
        wanted = calibrated_log_loss(logits, labels)[1]
        temperature = min(HIGHEST, max(LOWEST, wanted))
        if temperature != wanted:
            logger.warning(f"the temperature is limited to {temperature}: {len(labels)} samples do not determine it.")
        before, after = _judged(logits, labels), _judged(logits / temperature, labels)
        return cls(temperature, data, len(labels), (before[0], after[0]), (before[1], after[1]), weights)

    def save(self, folder: Path) -> Path:
        """Write ``ft_calibration.json`` beside the weights."""
        write_whole(folder / FILE, json.dumps(stored(self), indent=1) + "\n")
        return folder / FILE


def _judged(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Log loss and expected calibration error."""
    confidence, predicted = logits.double().softmax(1).max(1)
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    return loss, expected_calibration_error(confidence.numpy(), (predicted == labels).numpy())


def read_calibration(file: Path, weights: str) -> Calibration | None:
    """The calibration in a file; None, with a warning, if it belongs to other weights.

    Raises:
        CheckpointError: if the file is damaged.
    """
    content: Any = read_json(file)
    found = restored(Calibration, content, "the calibration of a model", complete=True)
    if found.weights != weights:
        logger.warning(f"{file} is not used, since the weights are others by now: run `hf-ft evaluate --calibrate`.")
        return None
    return found
