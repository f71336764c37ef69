"""The temperature of a model that ``hf-ft train`` wrote, fitted on the validation data that chose its best epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_ft.inference.calibration import FILE, Calibration, takes_temperature, unasked_temperature
from hf_ft.inference.checkpoint import weights_digest
from hf_ft.trainer.trainer import FTTrainer

DATA = "validation"


@contextmanager
def collected_outputs(trainer: FTTrainer) -> Iterator[list[Any]]:
    """The outputs and labels of each evaluation while it is entered, without another pass."""
    loop, collected = trainer.evaluation_loop, list[Any]()

    def collecting(*args: Any, **kwargs: Any) -> Any:
        collected.append(loop(*args, **kwargs))
        return collected[-1]

    trainer.evaluation_loop = collecting  # type: ignore[method-assign]
    try:
        yield collected
    finally:
        del trainer.evaluation_loop


def calibrated_on(trainer: FTTrainer, output: Any) -> tuple[Calibration | None, str]:
    """The calibration of a trainer's model, and a description of it.

    Args:
        output: the output of its evaluation on validation data.

    Returns:
        None if samples do not have one class each, or do not determine a temperature.
    """
    predictions, labels = output.predictions, output.label_ids
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    if not takes_temperature(predictions, labels):
        return None, ""
    logits, classes = torch.tensor(predictions, dtype=torch.float64), torch.tensor(labels).long()
    temperature, reason = unasked_temperature(logits, classes)
    if temperature is None:
        return None, f"none: {reason}"
    found = Calibration.at(temperature, logits, classes, DATA, weights_digest(trainer.model))
    losses, errors = (" to ".join(f"{value:.3f}" for value in both) for both in (found.log_loss, found.ece))
    return found, f"{temperature:.3g}, in {FILE}, from {found.rows:,} samples: log loss {losses}, ece {errors}"


def keep_calibration(found: Calibration | None, folder: Path) -> None:
    """Write it next to the weights, or remove the one of an earlier run."""
    if found is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder)
