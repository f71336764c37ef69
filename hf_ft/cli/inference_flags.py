"""Flags of ``hf-ft predict``, ``hf-ft evaluate`` and ``hf-ft export``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_ft.cli.flags import _flag, _list_flag
from hf_ft.data.inputs import Reading
from hf_ft.data.sounds import SECONDS
from hf_ft.errors import OptionError
from hf_ft.exports.settings import CHECKED, Settings
from hf_ft.inference.predictor import Options


@dataclass
class Sources:
    """A trained model, and data for it."""

    model: str | None = _flag("folder written by training, or Hub id; ensembles, deltas and adapters too")
    dataset: list[str] = _list_flag("")
    revision: str | None = _flag("branch, tag or commit of the model on the Hub")
    base: str | None = _flag("model that a delta or an adapter belongs to (default: the one that it names)")
    split: str | None = _flag("split to use if there are several (default: the test split, else the validation split)")
    config_name: str | None = _flag("configuration of a Hub data set")
    image_column: str | None = _flag("name of the image column (default: found by name and type)")
    audio_column: str | None = _flag("name of the audio column (default: found by name and type)")
    text_column: str | None = _flag("name of the text column, or two joined by a comma for pairs")
    label_column: str | None = _flag("name of the label column (default: found by name and type)")
    encoding: str | None = _flag("encoding of csv and tsv files, such as latin-1 (default: UTF-8)")
    batch_size: int = _flag("samples per batch; predictions do not depend on it", 32)

    def reading(self) -> Reading:
        """How the data are read."""
        return Reading(**{name: getattr(self, name) for name in Reading.__dataclass_fields__})


@dataclass
class ModelAndData(Sources):
    """What ``predict`` and ``evaluate`` take."""

    device: str | None = _flag("such as cpu or cuda:1 (default: an accelerator if there is one)")
    num_workers: int = _flag("processes that read and prepare samples; 0: none", 0)
    tta: bool = _flag("images: mean of the probabilities of each image and its mirror image", False)
    uncalibrated: bool = _flag("do not apply the checkpoint's temperature", False)
    threshold: float | None = _flag("several labels per sample: predict those above this probability (default: 0.5)")
    max_length: int | None = _flag("maximum text length in tokens (default: that of the model, at most 512)")
    max_seconds: float | None = _flag(f"length to which sounds are cut (default: {SECONDS:g})")

    def check(self) -> None:
        """Reject what cannot work, whatever the model and data.

        Raises:
            OptionError: naming the flag and the fix.
        """
        for name, what in (("model", "the folder that training wrote, or a Hub id"), ("dataset", "files or data")):
            if not getattr(self, name):
                raise OptionError(f"--{name} is missing: {what}.")
        for name, least in (("batch_size", 1), ("num_workers", 0), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"--{name} {value} is too small: set it to at least {least}.")

    def probability_threshold(self) -> float:
        """Above which one of several labels is predicted."""
        return 0.5 if self.threshold is None else self.threshold

    def options(self) -> Options:
        """How to predict."""
        return Options(
            batch_size=self.batch_size,
            device=self.device,
            tta=self.tta,
            max_length=self.max_length,
            seconds=self.max_seconds or SECONDS,
            workers=self.num_workers,
            calibrated=not self.uncalibrated,
        )


@dataclass
class PredictFlags(ModelAndData):
    """Flags of ``hf-ft predict``."""

    output: str | None = _flag("file to write, .csv or .jsonl (default: csv on standard output)")
    format: Literal["csv", "jsonl"] | None = _flag("csv or jsonl (default: by the suffix of --output, else csv)")
    top_k: int = _flag("number of classes to report, most probable first", 1)
    overwrite: bool = _flag("replace --output even if this command did not write it", False)


@dataclass
class EvaluateFlags(ModelAndData):
    """Flags of ``hf-ft evaluate``."""

    output_dir: str = _flag(
        "folder of evaluation.html, evaluation.md, evaluation.json and predictions.csv", "runs/evaluation"
    )
    calibrate: str | None = _flag(
        "labelled data, such as validation data, on which to fit a temperature; it is saved in the checkpoint as "
        "ft_calibration.json and used from then on"
    )
    calibrate_split: str | None = _flag("split of these data, like --split")
    overwrite: bool = _flag("replace files in --output_dir even if this command did not write them", False)


@dataclass
class ExportFlags(Sources):
    """Flags of ``hf-ft export``."""

    output_dir: str = _flag("folder for the files and for export.json, which describes them", "runs/export")
    formats: list[str] = _list_flag("onnx, or pt2 for torch.export, or both (default: onnx)")
    quantize: str | None = _flag(
        "int8: also write an ONNX file with 8-bit weights; it is scored on --dataset, if that has labels"
    )
    samples: int | None = _flag(
        f"number of samples to compare on, spread over the data (default: {CHECKED}, and all for int8)"
    )
    tolerance: float = _flag("how far logits may differ from those of the model, relative to them above 1", 1e-4)
    max_length: int | None = _flag("maximum text length in tokens (default: that of the model, at most 512)")
    max_seconds: float | None = _flag(f"length to which sounds are cut (default: {SECONDS:g})")
    overwrite: bool = _flag("replace an earlier export", False)

    def settings(self) -> Settings:
        """What to export, and how to check it.

        Raises:
            OptionError: for a value that cannot work.
        """
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise OptionError(f"--max_seconds {self.max_seconds:g} is not a length in seconds: set it above 0.")
        chosen: dict[str, Any] = {name: getattr(self, name) for name in _AS_THEY_ARE}
        formats: Any = tuple(dict.fromkeys(self.formats)) or ("onnx",)
        return Settings(formats=formats, seconds=self.max_seconds or SECONDS, **chosen)


_AS_THEY_ARE = ("quantize", "samples", "tolerance", "max_length", "overwrite", "batch_size")
WORDS: dict[str, Any] = {
    "predict": {
        "dataset": "files and folders of images or sounds, folders searched recursively; or one csv, tsv, json, jsonl "
        "or parquet file, folder of them, folder written by save_to_disk, or Hub id"
    },
    "evaluate": {
        "dataset": "folder with a folder of images or sounds for each class, or with such folders for each split; csv, "
        "tsv, json, jsonl or parquet file, or a folder of them; folder written by save_to_disk; or Hub id"
    },
    "export": {
        "dataset": "samples to compare on, as for `hf-ft predict`, ideally not those that the model was trained on "
        "(default: random ones)",
        "batch_size": "samples per batch in the comparison",
    },
}
