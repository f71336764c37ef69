"""The temperature of a checkpoint, applied by a Transformers pipeline."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

from hf_ft.errors import OptionError
from hf_ft.inference.calibration import FILE
from hf_ft.inference.checkpoint import calibration_of
from hf_ft.zoo.reading import file_of

TASKS = ("image-classification", "text-classification", "audio-classification", "video-classification")
P = TypeVar("P")  # importing Transformers' pipelines would take seconds


def calibrated(pipeline: P, temperature: float | None = None) -> P:
    r"""A classification pipeline whose probabilities are calibrated: :math:`\operatorname{softmax}(z / T)`.

        Predictions stay the same, in the same order. The given pipeline is left unchanged; both share one model.

    Args:
        pipeline: such as ``transformers.pipeline("image-classification", model="runs/photos")``.
        temperature: the number by which logits are divided (default: from the checkpoint's
            ``ft_calibration.json``).

    Raises:
        OptionError: if it is not a pipeline of a classifier that chooses one class, there is no temperature, or the
            temperature was fitted to other weights.
        CheckpointError: if ``ft_calibration.json`` is damaged.
    """
    given: Any = pipeline
    task = getattr(given, "task", type(given).__name__)
    if task not in TASKS:
        raise OptionError(f"pipeline={task!r} gives no class probabilities: pass one of {', '.join(TASKS)}.")
    config = given.model.config
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if kind != "single_label_classification":
        raise OptionError(
            f"the pipeline's model is one of {kind}: a temperature is for models that choose one class per sample. Use "
            "the pipeline as it is."
        )
    divisor = _known(given.model) if temperature is None else temperature
    if not 0 < divisor < math.inf:
        raise OptionError(f"temperature={temperature!r} must be above 0.", arguments=("temperature",))
    made = copy.copy(given)

    def forward(inputs: Any, **parameters: Any) -> Any:
        outputs = given._forward(inputs, **parameters)
        outputs["logits"] = outputs["logits"].float() / divisor
        return outputs

    made._forward = forward
    return made


def _known(model: Any) -> float:
    """The temperature in the checkpoint that a model was loaded from."""
    name, revision = str(model.name_or_path), getattr(model.config, "_commit_hash", None)
    file = file_of(name, FILE, revision) if name else None
    if file is None:
        raise OptionError(
            f"{name or 'the model'} has no {FILE}: fit a temperature with `hf-ft evaluate --calibrate`, or set "
            "temperature.",
            arguments=("temperature",),
        )
    found = calibration_of(file, model)
    if found is None:
        raise OptionError(
            f"the temperature of {name} was fitted to other weights, or to these in another precision: load the model "
            "as it was saved, or set temperature.",
            arguments=("temperature",),
        )
    return found.temperature
