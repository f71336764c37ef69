r"""How well probabilities match frequencies, and the temperature that brings them closer.

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
LOWEST, HIGHEST = 0.05, 20.0  # beyond, the samples only show that all predictions are right, or that none is confident
# Fewest samples to which a temperature is fitted by default. On four simulated tasks whose logits need none, fitting to
# 30 samples raises the log loss by 0.02 to 0.04 on average, to 12 by 0.05 to 0.09; if logits are twice too large,
# fitting to 30 lowers it by 0.01 to 0.15.
FEWEST = 30
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
    r"""The mean difference between accuracy and confidence, :math:`\sum_m \frac{|B_m|}{N} \, |acc(B_m) - conf(B_m)|`.

    Args:
        confidence: (N,), the probability of each predicted class.
        correct: (N,), whether it is the true one.
    """
    found = reliability(confidence, correct, bins)
    return sum(one.samples * abs(one.accuracy - one.confidence) for one in found) / max(1, len(confidence))


@dataclass(frozen=True)
class SplitCalibration:
    """How well probabilities match frequencies on some data, as trained and with a temperature.

    Attributes:
        log_loss: the mean of -log p of the true class (negative log likelihood); first as trained, then, if there is a
            temperature, with it.
        ece: expected calibration error, likewise.
        bins: accuracy by confidence as trained.
        calibrated_bins: the same with the temperature; empty without one.
    """

    log_loss: tuple[float, ...]
    ece: tuple[float, ...]
    bins: tuple[Bin, ...]
    calibrated_bins: tuple[Bin, ...] = ()

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, temperature: float | None = None) -> SplitCalibration:
        """Evaluate logits (N, C) against labels (N,)."""
        judged = [_judged(logits, labels)] + [_judged(logits / t, labels) for t in (temperature,) if t is not None]
        losses, errors, bins = zip(*judged, strict=True)
        return cls(losses, errors, *bins)


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it was fitted on.

    Attributes:
        temperature: the number by which logits are divided before the softmax.
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
            raise DataError(f"{data}: a temperature needs samples with finite logits, but there are {len(labels)}.")
        temperature, determined = fitted_temperature(logits, labels)
        if not determined:
            logger.warning(f"the temperature is limited to {temperature}: {len(labels)} samples do not determine it.")
        return cls.at(temperature, logits, labels, data, weights)

    @classmethod
    def at(cls, temperature: float, logits: Tensor, labels: Tensor, data: str, weights: str) -> Calibration:
        """A temperature with its effect on the samples that it was fitted on; arguments as of :meth:`fitted`."""
        found = SplitCalibration.of(logits, labels, temperature)
        losses, errors = ((first, last) for first, last in (found.log_loss, found.ece))
        return cls(temperature, data, len(labels), losses, errors, weights)

    def save(self, folder: Path) -> Path:
        """Write ``ft_calibration.json`` next to the weights."""
        write_whole(folder / FILE, json.dumps(stored(self), indent=1) + "\n")
        return folder / FILE


def fitted_temperature(logits: Tensor, labels: Tensor) -> tuple[float, bool]:
    """The temperature with the lowest log loss within the limits, and whether the samples determine it.

    Args:
        logits: (N, C), finite.
        labels: (N,).
    """
    wanted = calibrated_log_loss(logits, labels)[1]
    temperature = min(HIGHEST, max(LOWEST, wanted))
    return temperature, temperature == wanted


def unasked_temperature(logits: Tensor, labels: Tensor) -> tuple[float | None, str]:
    """The temperature for a classifier whose user did not request one; None, with the reason, if it might do harm.

    Args:
        logits: (N, C), of samples that the classifier was not trained on.
        labels: (N,).
    """
    if not bool(logits.isfinite().all()):
        return None, "logits are not finite"
    if len(labels) < FEWEST:
        return None, f"{len(labels)} validation samples are too few for a temperature, which needs {FEWEST}"
    temperature, determined = fitted_temperature(logits, labels)
    return (
        (temperature, "") if determined else (None, f"{len(labels)} validation samples do not determine a temperature")
    )


def takes_temperature(logits: Any, labels: Any) -> bool:
    """Whether arrays are logits (N, C) of two classes or more, and the number of one class for each sample.

    Labels that are shares of classes, several labels per sample and regression have no temperature.
    """
    if not isinstance(logits, np.ndarray) or not isinstance(labels, np.ndarray):
        return False
    single = logits.ndim == 2 and logits.shape[1] > 1 and labels.ndim == 1 and labels.dtype.kind in "iu"
    return bool(single and len(labels) and labels.min() >= 0)


def _judged(logits: Tensor, labels: Tensor) -> tuple[float, float, tuple[Bin, ...]]:
    """Log loss, expected calibration error, and accuracy by confidence."""
    confidences, predicted = logits.double().softmax(1).max(1)
    confidence, correct = confidences.numpy(), (predicted == labels).numpy()
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    return loss, expected_calibration_error(confidence, correct), tuple(reliability(confidence, correct))


def read_calibration(file: Path, weights: str) -> Calibration | None:
    """The calibration in a file; None, with a warning, if it belongs to other weights.

    Raises:
        CheckpointError: if the file is damaged.
    """
    content: Any = read_json(file)
    found = restored(Calibration, content, "the calibration of a model", complete=True)
    if found.weights != weights:
        logger.warning(f"{file} is not used, since the weights have changed since: run `hf-ft evaluate --calibrate`.")
        return None
    return found
