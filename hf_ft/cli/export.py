"""``hf-ft export``: a trained model as ONNX or ``torch.export``, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_ft.cli.checks import refuse
from hf_ft.cli.console import is_main, refusals, say, table
from hf_ft.cli.help import inference_help
from hf_ft.cli.inference_flags import WORDS, ExportFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.request import read_own
from hf_ft.data.inputs import read_inputs
from hf_ft.errors import OptionError
from hf_ft.exports.export import RANDOM, exported
from hf_ft.exports.record import Export
from hf_ft.exports.settings import check_target
from hf_ft.inference.checkpoint import Trained, load_trained
from hf_ft.inference.evaluation import data_name

_OF_DATA = ("split", "config_name", "image_column", "audio_column", "text_column", "label_column", "encoding")


def run_export(arguments: list[str]) -> None:
    """Write the files, and report how they differ from the model."""
    if not arguments or {"-h", "--help"} & set(arguments):
        say(inference_help("export", ExportFlags, WORDS["export"]))
        return
    flags: ExportFlags = read_own(arguments, ExportFlags, "export")
    if not flags.model:
        raise OptionError("--model is missing: the folder that training wrote, or a Hub id.")
    if not flags.dataset:
        refuse({name: getattr(flags, name) for name in (*_OF_DATA, "samples")}, (*_OF_DATA, "samples"), "no --dataset")
    settings, folder = flags.settings(), Path(flags.output_dir).expanduser()
    check_target(folder, settings)
    if not is_main():  # of several processes, one exports
        return
    quieten()
    with refusals():
        trained = load_trained(flags.model, revision=flags.revision, base=flags.base)
    _check_fitting(flags, trained)
    inputs = read_inputs(flags.dataset, trained.wanted, flags.reading()) if flags.dataset else None
    if inputs is not None and inputs.why_not:
        say(f"note: no scores: {inputs.why_not}", error=True)
    data = data_name(flags.dataset) + (f" ({flags.split})" if flags.split else "") if flags.dataset else RANDOM
    _tell(exported(trained, folder, settings, inputs, data))


def _check_fitting(flags: ExportFlags, trained: Trained) -> None:
    for name, task in (("max_length", "text"), ("max_seconds", "audio")):
        if trained.wanted.task != task:
            refuse({name: getattr(flags, name)}, [name], f"the model classifies {trained.wanted.task} data")


def _tell(export: Export) -> None:
    """The files with their differences, and what they were measured on."""
    content = export.content
    check, names = content["check"], ("accuracy", "macro_f1", "r2", "mse")
    metric = next((name for name in names if name in check["scores"]), None)
    rows = []
    for name, one in content["files"].items():
        told: list[Any] = [name, f"{one['bytes'] / 1e6:.3g} MB"]
        if "agreement" in one:
            told += [f"{one['largest_difference']:.2g}", f"{one['agreement']:.1%}"]
            told += [f"{one['scores'][metric]:.4f}"] if metric else []
        rows.append(told + [""] * (4 + bool(metric) - len(told)))
    if metric:
        rows.insert(0, ["the model itself", "", "", "", f"{check['scores'][metric]:.4f}"])
    say(table(rows, ["file", "size", "largest difference", "same predictions", *([metric] if metric else [])]))
    sizes = ", ".join(map(str, check["batch_sizes"]))
    unread = f"; {check['unreadable']:,} more cannot be read" if check["unreadable"] else ""
    data = check["data"] if check["data"] == RANDOM else f"samples of {check['data']}"
    say(f"\nCompared on {check['samples']:,} {data}{unread}, in batches of {sizes}.")
    if check["data"] == RANDOM:
        say("note: give your own samples with --dataset to compare on them.", error=True)
    if metric is None and any("int8" in name for name in content["files"]):
        say("note: the accuracy lost to int8 is unknown: give labelled data with --dataset.", error=True)
    for part in content["processing"]:
        if part.get("image", True) is None:
            say(
                f"note: export.json has no preprocessing for {part['processor']['image_processor_type']}.",
                error=True,
            )
    say(f"In {export.folder}: {', '.join(file.name for file in export.files)}.")
