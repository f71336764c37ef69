"""Export of a trained classifier: it is written, run again from the file, compared with the model, and described."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_ft.data.inputs import Inputs, Reading, read_inputs
from hf_ft.documents.files import write_whole
from hf_ft.engine.checkpoint_folders import files_written_whole
from hf_ft.errors import DataError, OptionError
from hf_ft.exports.check import MODEL, Comparison, Difference, compare
from hf_ft.exports.graph import Example, other_attention, plain_model, reason, traced, write_onnx
from hf_ft.exports.processing import processing
from hf_ft.exports.random_inputs import random_inputs
from hf_ft.exports.record import RECORD, Export, about, checks_of, remove_earlier, told_check, told_files
from hf_ft.exports.runtimes import Run, in_onnxruntime, in_program, in_torch, quantize
from hf_ft.exports.settings import INT8, ONNX, PROGRAM, Format, Settings, check_target
from hf_ft.inference.batches import Batch, Batches
from hf_ft.inference.checkpoint import Trained
from hf_ft.inference.evaluation import data_name
from hf_ft.inference.predictor import Source, sources_of, trained_of

RANDOM = "random samples"
TRACED = 3  # samples in the batch that a model is traced with


def export(
    model: Any,
    folder: str | Path,
    *,
    data: Source | None = None,
    processor: Any = None,
    reading: Reading | None = None,
    revision: str | None = None,
    formats: Sequence[Format] = ("onnx",),
    **settings: Any,
) -> Export:
    r"""Export a trained classifier to ONNX or ``torch.export``, and check what was written.

    The graph takes the tensors that the processor creates, with a free batch size, and free lengths if the model
    supports them, and returns logits (B, C) in float32. Adapters are merged; ensembles and models with two paths are
    one graph. Each file is run again, on the CPU, and compared with the model:

    .. math:: \max_{n, c} \frac{|z_{nc} - z'_{nc}|}{\max(1, |z_{nc}|)} \le \texttt{tolerance}

    on random samples of several sizes, in batches of one and of several, and on those of ``data``. If they differ by
    more, nothing is written. ``export.json`` holds classes, temperature, and the preprocessing of inputs.

    Args:
        model: Hub id or folder of a checkpoint, or a model, which is left unchanged.
        folder: where to write.
        data: samples to compare on, as for :func:`~hf_ft.inference.predict`; with labels, the scores of the quantised
            model are measured on them.
        processor: the processor of a model in memory.
        reading: columns and split of the data, if they cannot be found.
        revision: branch, tag or commit of a Hub id.
        formats: ``onnx``, ``pt2``.
        settings: fields of :class:`~hf_ft.exports.Settings`: ``quantize``, ``overwrite``, ``tolerance``, ``samples``,
            ``batch_size``, ``max_length``, ``seconds``.

    Raises:
        OptionError: if the model cannot be exported, with the exporter's reason; if an option cannot work; or if a
            file already exists.
        CheckpointError: if weights are missing or damaged.
        DataError: if the data cannot be read.
        ImportError: if the packages for ONNX are missing; the message contains the pip command.
    """
    names: Any = (formats,) if isinstance(formats, str) else tuple(formats)
    chosen = Settings(formats=names, **settings)
    check_target(Path(folder), chosen)
    trained = trained_of(model, processor, revision)
    if not isinstance(model, str | Path):
        trained = replace(trained, model=copy.deepcopy(trained.model))
    inputs = None if data is None else read_inputs(sources_of(data), trained.wanted, reading)
    return exported(trained, Path(folder), chosen, inputs, RANDOM if data is None else data_name(data))


def exported(trained: Trained, folder: Path, settings: Settings, inputs: Inputs | None, data: str) -> Export:
    """:func:`export` for a loaded model, which it changes.

    Args:
        inputs: samples to compare on; None for random ones only.
        data: their name.
    """
    noise, dtype = random_inputs(trained), str(trained.model.dtype).removeprefix("torch.")
    with files_written_whole(folder) as written:
        example = Example.of(_batches(trained, noise, settings, TRACED), trained.wanted.task)
        trained = replace(trained, model=_plain(trained.model, example, settings))
        _write(trained, example, written, settings)
        runs = {MODEL: in_torch(trained.model), **{name: _run_of(written / name) for name in settings.files}}
        sizes = (1, TRACED)
        both = (batch for size in sizes for batch in _each(_batches(trained, noise, settings, size)))
        checked = compare(trained, runs, both)
        _check(checked, settings, RANDOM)
        content = about(trained, example, dtype)
        content["processing"] = processing(trained, example.inputs, _batches(trained, noise, settings, TRACED), written)
        if inputs is not None:
            inputs = spread(inputs, settings.sampled)
            batches = _batches(trained, inputs, settings, settings.batch_size)
            measured = compare(trained, runs, _each(batches), inputs.labels)
            _check_readable(measured, len(inputs.rows))
            _check(measured, settings, data)
            checked = measured
        content["files"] = told_files(written, checks_of(checked))
        content["check"] = told_check(checked, settings.tolerance, data, len((inputs or noise).rows), sizes)
        if settings.overwrite:
            remove_earlier(folder, content["files"])
    write_whole(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return Export(folder, content)


def spread(inputs: Inputs, number: int | None) -> Inputs:
    """This many samples, evenly spread: data are often sorted by class."""
    rows = len(inputs.rows)
    if number is None or number >= rows:
        return inputs
    chosen = [index * rows // number for index in range(number)]
    labels = None if inputs.labels is None else [inputs.labels[row] for row in chosen]
    return replace(inputs, rows=inputs.rows.select(chosen), labels=labels)


def _batches(trained: Trained, inputs: Inputs, settings: Settings, size: int) -> Batches:
    return Batches(trained, inputs, size, max_length=settings.max_length, seconds=settings.seconds)


def _each(batches: Batches) -> Iterator[Batch]:
    return (batches[number] for number in range(len(batches)))


def _plain(model: Any, example: Example, settings: Settings) -> Any:
    """The model in float32 without adapters, checked to give the same logits as with them."""
    wanted = in_torch(model.to("cpu", torch.float32).eval())(example.inputs)
    model = plain_model(model)
    difference = Difference()
    difference.see(wanted, in_torch(model)(example.inputs), "regression")
    if not difference.largest <= settings.tolerance:
        raise _differs("the model with its adapters merged", difference, settings, RANDOM)
    return model


def _write(trained: Trained, example: Example, folder: Path, settings: Settings) -> None:
    """Write all graphs; models with attention that an exporter does not know are exported with plain attention.

    Raises:
        OptionError: with the exporter's reason.
    """
    name = trained.name or type(trained.model).__name__
    step = "be traced by torch.export, on which all formats depend"
    fix = "Use it with hf_ft.predict."
    while True:
        try:
            program = traced(trained.model, example)
            if "pt2" in settings.formats:
                step, fix = "be saved by torch.export", "Leave pt2 out of the formats."
                torch.export.save(program, folder / PROGRAM)
            if "onnx" in settings.formats:
                step, fix = "be converted to ONNX", "Set formats to pt2."
                write_onnx(program, example, folder / ONNX)
            break
        except Exception as error:  # exporters raise almost anything
            if not other_attention(trained.model):
                raise OptionError(f"{name} cannot {step} ({reason(error)}). {fix}", arguments=("formats",)) from error
    if settings.quantize:
        try:
            quantize(folder / ONNX, folder / INT8)
        except Exception as error:
            raise OptionError(
                f"{name} cannot be quantised by onnxruntime ({reason(error)}): leave out quantize.",
                arguments=("quantize",),
            ) from error


def _run_of(file: Path) -> Run:
    return in_program(file) if file.name == PROGRAM else in_onnxruntime(file)


def _check(found: Comparison, settings: Settings, data: str) -> None:
    """Refuse an export whose logits differ from those of the model.

    Raises:
        OptionError: naming the file and the difference.
    """
    for name, difference in found.differences.items():
        if not difference.largest <= (float("1e30") if name == INT8 else settings.tolerance):
            raise _differs(name, difference, settings, data)


def _differs(what: str, difference: Difference, settings: Settings, data: str) -> OptionError:
    return OptionError(
        f"the logits of {what} differ by {difference.largest:.2g} from those of the model on {data}, more than "
        f"tolerance={settings.tolerance:g}, so nothing is written: choose other formats, or raise tolerance.",
        arguments=("tolerance",),
    )


def _check_readable(found: Comparison, rows: int) -> None:
    if len(found.unreadable) == rows:
        first = next(iter(found.unreadable.values()))
        raise DataError(f"none of the {rows:,} samples to compare on can be read; the first: {first}. Use other data.")
