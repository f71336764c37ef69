"""The outputs of a comparison's final models: scored, calibrated, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from hf_ft.documents.files import replace_whole
from hf_ft.inference.calibration import Calibration, SplitCalibration, takes_temperature, unasked_temperature
from hf_ft.inference.checkpoint import weights_digest
from hf_ft.trainer.trainer import FTTrainer

VALIDATION = "validation"
TESTS = ("test", "ood")
LOGITS = "logits.safetensors"  # next to a model, until it is known which one is kept
LABELS = ".labels"  # ends the name of a split's labels in that file


@dataclass(frozen=True)
class Outputs:
    """A model's outputs and the labels by split, in the order of the split.

    Attributes:
        logits: (N, C) float32; for regression, its numbers.
        labels: (N,) for one class per sample.
    """

    logits: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]

    def save(self, file: Path) -> None:
        """Write safetensors: exact, so that what is computed from them agrees with the results."""
        arrays = {**self.logits, **{f"{split}{LABELS}": labels for split, labels in self.labels.items()}}
        content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(file, lambda temporary: save_file(content, temporary))

    @classmethod
    def load(cls, file: Path) -> Outputs:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: if there is no such file.
            SafetensorError: if it is damaged.
        """
        content = load_file(file)
        splits = [name for name in content if not name.endswith(LABELS)]
        return cls(
            {split: content[split] for split in splits}, {split: content[f"{split}{LABELS}"] for split in splits}
        )

    def single(self, split: str) -> bool:
        """Whether samples of a split have one class each, and outputs are its logits."""
        return split in self.logits and takes_temperature(self.logits[split], self.labels[split])

    def tensors(self, split: str) -> tuple[Tensor, Tensor]:
        """Logits (N, C) in float64 and classes (N,)."""
        return torch.tensor(self.logits[split], dtype=torch.float64), torch.tensor(self.labels[split]).long()

    @property
    def predictions(self) -> dict[str, tuple[int, ...]]:
        """The predicted classes by split, if samples have one class each."""
        return {split: tuple(z.argmax(-1).tolist()) for split, z in self.logits.items() if self.single(split)}

    @cached_property
    def temperature(self) -> float | None:
        """Fitted on validation alone; None if there is no single class per sample, or samples do not determine it."""
        return unasked_temperature(*self.tensors(VALIDATION))[0] if self.single(VALIDATION) else None

    @property
    def calibration(self) -> dict[str, SplitCalibration]:
        """By split, if samples have one class each and logits are finite."""
        usable = (split for split in self.logits if self.single(split) and np.isfinite(self.logits[split]).all())
        return {split: SplitCalibration.of(*self.tensors(split), self.temperature) for split in usable}

    def save_calibration(self, model: Any, folder: Path) -> None:
        """Write the temperature, if there is one, next to the weights of the model."""
        if self.temperature is not None:
            weights = weights_digest(model)
            Calibration.at(self.temperature, *self.tensors(VALIDATION), VALIDATION, weights).save(folder)


@dataclass(frozen=True)
class Scored(Outputs):
    """Outputs with their scores.

    Attributes:
        scores: all metrics by split.
    """

    scores: Mapping[str, Mapping[str, float]]


def scored(trainer: FTTrainer, data: Mapping[str, Any]) -> Scored:
    """Predict validation and test sets, once each, with a trainer's model."""
    scores, logits, labels = {}, {}, {}
    for split in (VALIDATION, *(name for name in TESTS if name in data)):
        output = trainer.predict(data[split])
        scores[split] = {
            key.removeprefix("test_"): float(value)
            for key, value in (output.metrics or {}).items()
            if not key.endswith(("_runtime", "_per_second", "_preparation_time"))
        }
        found = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        logits[split], labels[split] = np.asarray(found, np.float32), np.asarray(output.label_ids)
    return Scored(logits, labels, scores)
