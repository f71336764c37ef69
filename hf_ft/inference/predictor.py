"""Predictions of a trained classifier on any data, batch by batch, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from hf_ft.data.columns import ProblemType
from hf_ft.data.inputs import Inputs, Reading, read_inputs
from hf_ft.data.progress import bar
from hf_ft.data.sounds import SECONDS
from hf_ft.errors import OptionError
from hf_ft.inference.batches import Batch, Batches
from hf_ft.inference.checkpoint import Trained, load_trained

Source: TypeAlias = str | Path | Sequence[str | Path] | Dataset


@dataclass(frozen=True)
class Prediction:
    """The prediction for one sample.

    Attributes:
        row: its number in the data, from 0.
        file: its path, if it is a file.
        outputs: (C,) float64: probabilities of the classes (for several labels per sample, each on its own), or the
            numbers of a regression; None if the sample cannot be read.
        label: its true label, if known: a class number, (C,) zeros and ones, or a number.
        error: why it cannot be read; empty if it can.
    """

    row: int
    file: str | None
    outputs: np.ndarray | None
    label: Any = None
    error: str = ""


@dataclass(frozen=True)
class Options:
    """How to predict.

    Attributes:
        batch_size: samples per batch.
        device: such as ``cpu`` or ``cuda:1``; by default an accelerator if there is one.
        tta: test-time augmentation: the mean over each image and its mirror image.
        max_length: maximum text length in tokens; by default that of the model, at most 512.
        seconds: length to which sounds are cut.
        workers: processes that read and process samples; 0 for none.
        calibrated: divide logits by the temperature of the checkpoint's calibration, if it has one.
    """

    batch_size: int = 32
    device: str | torch.device | None = None
    tta: bool = False
    max_length: int | None = None
    seconds: float = SECONDS
    workers: int = 0
    calibrated: bool = True


def predict(
    model: Any,
    data: Source,
    *,
    processor: Any = None,
    reading: Reading | None = None,
    revision: str | None = None,
    **options: Any,
) -> Iterator[Prediction]:
    r"""Predict the samples of any data with a trained classifier.

    .. math:: p = \operatorname{softmax}(z), \qquad \text{with } \texttt{tta: } p = \tfrac12
        \big(\operatorname{softmax}(z(x)) + \operatorname{softmax}(z(\overleftrightarrow{x}))\big)

    in float64; :math:`\sigma` in place of the softmax for several labels per sample, the output itself for
    regression; logits are divided by the temperature of a calibrated checkpoint. Predictions do not depend on the batch
    size: padding is masked, and sounds of different lengths, or texts for a model without an attention mask, form
    separate batches.

    Args:
        model: Hub id or folder of a checkpoint, or a model.
        data: a file, a folder, a table, a data set on the Hub; several files; or a data set.
        processor: the image processor, feature extractor or tokenizer, if a model is passed.
        reading: columns, split and so on, if they cannot be found.
        revision: branch, tag or commit of the model on the Hub.
        options: fields of :class:`Options`.

    Yields:
        One prediction per sample, in order; damaged ones have an ``error``.

    Raises:
        OptionError: if the model is not a trained classifier, or an option does not suit it.
        CheckpointError: if its weights are missing or damaged.
        DataError: if there are no data, or they are of another kind.
    """
    trained = trained_of(model, processor, revision)
    inputs = read_inputs(sources_of(data), trained.wanted, reading)
    return predictions(trained, inputs, Options(**options))


def trained_of(model: Any, processor: Any = None, revision: str | None = None) -> Trained:
    """The classifier of a Hub id or folder, or one in memory with its processor."""
    if isinstance(model, str | Path):
        return load_trained(model, revision=revision)
    return Trained.of(model, processor)


def sources_of(data: Source) -> Sequence[str | Path] | Dataset:
    """One source as a list of one."""
    return [data] if isinstance(data, str | Path) else data


def predictions(trained: Trained, inputs: Inputs, options: Options) -> Iterator[Prediction]:
    """Predict all samples of some inputs; arguments as of :func:`predict`."""
    found = _outputs(trained, inputs, options)  # errors are raised now, not with the first batch
    temperature = trained.temperature if options.calibrated else 1.0
    return _answered(found, inputs, temperature, trained.wanted.problem_type)


def logits(trained: Trained, inputs: Inputs, options: Options) -> Iterator[tuple[int, Tensor]]:
    """The logits (C,) in float64 of each sample that can be read, with its number."""
    for batch, views in _outputs(trained, inputs, options):
        yield from ((row, views[0][row]) for row in batch.rows if row in views[0])


def _answered(
    found: Iterator[tuple[Batch, list[dict[int, Tensor]]]], inputs: Inputs, temperature: float, kind: ProblemType
) -> Iterator[Prediction]:
    for batch, views in found:
        for row, file in zip(batch.rows, batch.files, strict=True):
            answers = [activated(view[row] / temperature, kind) for view in views if row in view]
            outputs = torch.stack(answers).mean(0).numpy() if answers else None
            label = None if inputs.labels is None else inputs.labels[row]
            yield Prediction(row, file, outputs, label, batch.errors.get(row, ""))


def activated(outputs: Tensor, kind: ProblemType) -> Tensor:
    """Logits (..., C) as probabilities; the outputs of a regression model as they are."""
    if kind == "regression":
        return outputs
    return outputs.sigmoid() if kind == "multi_label_classification" else outputs.softmax(-1)


def _outputs(trained: Trained, inputs: Inputs, options: Options) -> Iterator[tuple[Batch, list[dict[int, Tensor]]]]:
    """Each batch with the logits (C,) of its samples by their numbers, for each view."""
    batches = Batches(trained, inputs, options.batch_size, options.tta, options.max_length, options.seconds)
    return _run(trained, batches, _device(options.device), options.workers)


def _device(wanted: str | torch.device | None) -> torch.device:
    """The device, or an accelerator if there is one.

    Raises:
        OptionError: if there is no such device.
    """
    present = torch.accelerator.is_available()  # without one, older versions of torch refuse to name it
    device = wanted or (torch.accelerator.current_accelerator() if present else None) or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # from backends that torch was built without
        reason = str(error).splitlines()[0].rstrip(".")
        raise OptionError(
            f"{device} cannot be used ({reason}): set device to cpu, or to one that is available.",
            arguments=("device",),
        ) from error
    return torch.device(device)


def _run(
    trained: Trained, batches: Batches, device: torch.device, workers: int
) -> Iterator[tuple[Batch, list[dict[int, Tensor]]]]:
    model = trained.model.to(device).eval()
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    with bar("predicting", len(batches.rows), unit=" rows") as shown:
        for batch in loader:
            yield batch, [_of_view(model, view, device) for view in batch.views]
            shown.update(len(batch.rows))


def _of_view(model: Any, view: Any, device: torch.device) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for numbers, inputs in view:
        with torch.no_grad():  # not in inference mode, which models with two paths cannot run in
            outputs = model(**{name: _moved(value, device, model.dtype) for name, value in inputs.items()}).logits
        found |= zip(numbers, outputs.reshape(len(numbers), -1).double().cpu(), strict=True)
    return found


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor on the device, pixels and sounds with the precision of the model."""
    return value.to(device, dtype if value.is_floating_point() else None)


__all__ = ["Options", "Prediction", "predict"]
